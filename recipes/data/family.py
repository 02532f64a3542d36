"""What the programs beside this file share: tasks are split, and a family's files are written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from meta_peft.errors import MetaPeftError

Rows = list[dict[str, str]]
Tasks = dict[str, Rows]
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}


def split(tasks: Tasks, seed: int, group: Callable[[str], str] = str) -> dict[str, Tasks]:
    """Tasks by split, about 60, 15 and 25 % of the groups; tasks of one group stay together."""
    groups = sorted({group(name) for name in tasks})
    np.random.default_rng(seed).shuffle(groups)
    bounds = np.cumsum([round(share * len(groups)) for share in SHARES.values()])[:-1]
    place = {name: int(np.searchsorted(bounds, i, "right")) for i, name in enumerate(groups)}
    return {
        part: {name: rows for name, rows in tasks.items() if place[group(name)] == i} for i, part in enumerate(SHARES)
    }


def sample(rows: Rows, most: int, seed: int) -> Rows:
    """At most so many of `rows`, in random order."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:most]]


def draws(classes: Tasks, ways: int, rows_per_class: int, n: int, rng: np.random.Generator) -> Tasks:
    """At most `n` different sets of so many classes, each with as many rows of every class, labelled by it."""
    tasks: Tasks = {}
    names = sorted(classes)
    for _ in range(20 * n):
        drawn = [names[i] for i in rng.choice(len(names), ways, replace=False)]
        name = " ".join(sorted(drawn))
        if name in tasks:
            continue
        tasks[name] = [
            {**row, "label": label}
            for label in drawn
            for row in sample(classes[label], rows_per_class, int(rng.integers(2**31)))
        ]
        if len(tasks) == n:
            break
    return tasks


def exclusive_draws(
    classes: Tasks,
    classes_of: Mapping[str, set[str]],
    ways: int,
    rows_per_class: int,
    n: int,
    rng: np.random.Generator,
) -> Tasks:
    """As `draws`, where a text may be of several classes (`classes_of`): a task has those of one of its classes alone."""
    tasks: Tasks = {}
    names = sorted(classes)
    for _ in range(50 * n if len(names) >= ways else 0):
        drawn = {names[i] for i in rng.choice(len(names), ways, replace=False)}
        name = " ".join(sorted(drawn))
        own = [[row for row in classes[c] if classes_of[row["text"]] & drawn == {c}] for c in sorted(drawn)]
        if name not in tasks and min(map(len, own)) >= rows_per_class:
            tasks[name] = [row for rows in own for row in sample(rows, rows_per_class, int(rng.integers(2**31)))]
        if len(tasks) == n:
            break
    return tasks


def write(folder: Path, splits: Mapping[str, Tasks], source: str) -> None:
    """``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``SOURCE.md``, each written aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{part}.jsonl": "".join(
            json.dumps({"task": name, **row}, ensure_ascii=False) + "\n" for name, rows in tasks.items() for row in rows
        )
        for part, tasks in splits.items()
    }
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as aside:
        for name, text in {**texts, "SOURCE.md": source.strip() + "\n"}.items():
            path = Path(aside) / name
            path.write_text(text, encoding="utf-8")
            os.replace(path, folder / name)


def run(
    family: str,
    about: str,
    source: str,
    make: Callable[[argparse.Namespace, Path], Mapping[str, Tasks]],
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    words: list[str] | None = None,
) -> int:
    """The whole program; returns its exit code.

    Args:
        family: the folder's name, unless another folder is given.
        about: the program's docstring.
        source: where the data is from, and under which licence.
        make: the tasks of each split, from the options and an empty folder for what is downloaded.
        options: adds to the command line.
        words: the command line.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data") / family, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="which tasks are in which split, and which rows are taken")
    options(parser)
    chosen = parser.parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            splits = make(chosen, Path(scratch))
        write(chosen.folder, splits, source)
    except (MetaPeftError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for part, tasks in splits.items():
        print(f"{part}: {len(tasks)} tasks, {sum(map(len, tasks.values()))} rows")
    print(f"in {chosen.folder}")
    return 0
