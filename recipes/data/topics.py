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
from family import Rows, Tasks, run, sample, split

from meta_peft.packages import pip_download

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
    topics = split({name: [{"text": word} for word in words] for name, words in words_of.items()}, seed)
    taken: set[str] = set()
    tasks = {}
    for part, n_tasks in reversed(N_TASKS.items()):
        own = {name: {row["text"] for row in rows} - taken for name, rows in topics[part].items()}
        taken |= set().union(*own.values())
        tasks[part] = draws(own, n_tasks, np.random.default_rng(seed))
    return {part: tasks[part] for part in N_TASKS}


def draws(words_of: dict[str, set[str]], n: int, rng: np.random.Generator) -> Tasks:
    """At most `n` different draws of categories of which each has enough words of its own."""
    tasks: Tasks = {}
    names = sorted(name for name, words in words_of.items() if len(words) >= ROWS_PER_TOPIC)
    for _ in range(50 * n if len(names) >= WAYS else 0):
        drawn = sorted(names[i] for i in rng.choice(len(names), WAYS, replace=False))
        others = {name: set().union(*(words_of[other] for other in drawn if other != name)) for name in drawn}
        own: Tasks = {
            name: [{"text": word, "label": name} for word in sorted(words_of[name] - others[name])] for name in drawn
        }
        if " ".join(drawn) not in tasks and min(map(len, own.values())) >= ROWS_PER_TOPIC:
            rows: Rows = []
            for of_one in own.values():
                rows += sample(of_one, ROWS_PER_TOPIC, int(rng.integers(2**31)))
            tasks[" ".join(drawn)] = rows
        if len(tasks) == n:
            break
    return tasks


def main(words: list[str] | None = None) -> int:
    return run("topics", str(__doc__), SOURCE, make, words=words)


if __name__ == "__main__":
    sys.exit(main())
