"""Dates, names, e-mail addresses, units, and how a function rewrites them: python recipes/data/data_wrangling.py [FOLDER]

One task is one function, such as "the day of a date" or "initials of a name"; what it does is in the examples alone.
Variants of a function are in the same split.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path

from bigbench import SOURCE, examples, families
from family import Tasks, run, split

FEWEST_ROWS = 20


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(families() / "mult_data_wrangling", options.seed)


def tasks_of(folder: Path, seed: int) -> dict[str, Tasks]:
    """Tasks by split, from the files ``FUNCTION_NUMBER_DOMAIN_STYLE/task.json``; the second style has the same examples."""
    tasks: Tasks = {}
    for file in sorted(folder.glob("*_1/task.json")):
        pairs = {" | ".join(quoted(given)): " | ".join(quoted(wanted)) for given, wanted in examples(file)}
        rows = [{"input": given, "target": wanted} for given, wanted in pairs.items() if given and wanted]
        if len(rows) >= FEWEST_ROWS:
            tasks[file.parent.name.removesuffix("_1")] = rows
    return split(tasks, seed, group=lambda name: re.sub(r"_(\d+|na)_[a-z]+$", "", name))


def quoted(text: str) -> list[str]:
    """The parts of ``'a', 'b'``."""
    return [part.strip() for part in text.strip("'").split("', '")]


def main(words: list[str] | None = None) -> int:
    return run("data_wrangling", str(__doc__), f"# Rewriting texts\n{SOURCE}", make, words=words)


if __name__ == "__main__":
    sys.exit(main())
