"""Words and what they have to do with: python recipes/data/topics.py [FOLDER]

Data for the recipe decoder_classification. A task is a draw of four of Empath's 194 categories, such as cooking, envy or
banking, and words that belong to one of them alone. Splits are by category, and no word is in two of them: training
categories go without the words of the others, validation categories without those of test categories.
"""

from __future__ import annotations

import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
from family import Tasks, exclusive_draws, run, split

from meta_peft.base.packages import pip_download

PACKAGE, VERSION = "empath", "0.89"
SOURCE = f"""
# Words by topic

The categories of Empath, from the Python package {PACKAGE}=={VERSION}, file `empath/data/categories.tsv`. The package
names no licence. Fast, Chen and Bernstein, Empath: Understanding topic signals in large-scale text, CHI 2016, arXiv
1602.06979.
"""
WAYS, ROWS_PER_TOPIC = 4, 24
N_TASKS = {"train": 120, "validation": 16, "test": 30}


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    with tarfile.open(pip_download(PACKAGE, VERSION, scratch, source=True)) as archive:
        lexicon = archive.extractfile(f"{PACKAGE}-{VERSION}/empath/data/categories.tsv")
        assert lexicon is not None, "a file"
        return tasks_of(lexicon.read().decode("utf-8"), options.seed)


def tasks_of(lexicon: str, seed: int) -> dict[str, Tasks]:
    """Tasks by split, from lines of a category and its words, with tabs between them."""
    lines = (line.split("\t") for line in lexicon.splitlines())
    words_of = {name: sorted({word.replace("_", " ") for word in words if word}) for name, *words in lines}
    topics = split({name: [{"text": word, "label": name} for word in words] for name, words in words_of.items()}, seed)
    taken: set[str] = set()
    tasks = {}
    for part, n_tasks in reversed(N_TASKS.items()):
        left = {name: [row for row in rows if row["text"] not in taken] for name, rows in topics[part].items()}
        topics_of: dict[str, set[str]] = {}
        for name, rows in left.items():
            for row in rows:
                topics_of.setdefault(row["text"], set()).add(name)
        taken |= set(topics_of)
        many = {name: rows for name, rows in left.items() if len(rows) >= ROWS_PER_TOPIC}
        tasks[part] = exclusive_draws(many, topics_of, WAYS, ROWS_PER_TOPIC, n_tasks, np.random.default_rng(seed))
    return {part: tasks[part] for part in N_TASKS}


def main(words: list[str] | None = None) -> int:
    return run("topics", str(__doc__), SOURCE, make, words=words)


if __name__ == "__main__":
    sys.exit(main())
