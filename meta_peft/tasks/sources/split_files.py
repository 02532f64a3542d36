"""Which files of a folder are which split, by the names that datasets of the hub give them.

`datasets` guesses splits of the same names, but for what it loads alone, and by rules that change: a word anywhere in a
path makes a split, and what has none is left out without a word. Here names are exact, and what only looks like splits
is an error: its rows must not be trained on by mistake.
"""

from __future__ import annotations

import re
from pathlib import Path

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources.folders import ENDS, files_below, holds_rows, say_not_read
from meta_peft.utils.words import listed

HELD_OUT = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
SPLIT_NAMES = {"train", "training"} | HELD_OUT
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # of a split with any name, as the hub writes it
NUMBER = re.compile(r"[-_. ]?\d+$")
SPLIT_OF_CARD = re.compile(r"^[ -]*split: *[\"']?([\w.]+)", re.MULTILINE)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Files and folders by split, those of `folder` or of the folder ``data`` in it; none if nothing is called so.

    Raises:
        MetaPeftError: there seem to be splits, and it cannot be told which file is of which.
    """
    found = {place: splits for place in (folder, folder / "data") if (splits := _by_split(place))}
    if len(found) > 1:
        raise MetaPeftError(
            f"There are splits both in {folder} and in its folder data: give the latter as dataset_name, or move it away."
        )
    if not found:
        _check_no_splits(folder)
        return {}
    splits = next(iter(found.values()))
    parts = {part for of_split in splits.values() for part in of_split}
    others = [file for file in files_below(folder) if not parts & {file, *file.parents}]
    say_not_read(folder, others, f"called after no split or of another kind than {ENDS}")
    return splits


def _by_split(place: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for part in sorted(place.iterdir()) if place.is_dir() else ():
        split = _split_of(part)
        if split and any(map(holds_rows, files_below(part) if part.is_dir() else [part])):
            found.setdefault(split, []).append(part)
    return found if any(_words(split) & SPLIT_NAMES for split in found) else {}


def _split_of(part: Path) -> str | None:
    """``train`` of train.jsonl, train-1.csv, train-00000-of-00002.parquet and the folder train."""
    name = part.name if part.is_dir() else part.stem
    if shard := SHARD.match(name):
        return shard[1]
    name = NUMBER.sub("", name).lower()
    return name if name in SPLIT_NAMES else None


def _words(name: str) -> set[str]:
    return set(re.split(r"[-._ \d/]+", name.lower()))


def _check_no_splits(folder: Path) -> None:
    """Raise if not all files below are of one split, by words in their names or by what the dataset's card says."""
    names = [file.relative_to(folder).as_posix() for file in files_below(folder) if holds_rows(file)]
    said = next((f"such as {name}" for name in names if _words(name) & HELD_OUT), None)
    on_card = sorted(set(SPLIT_OF_CARD.findall(_front_matter(folder / "README.md"))))
    if said is None and len(on_card) > 1:
        said = f"{listed(on_card)} by its README.md"
    if said is not None:
        raise MetaPeftError(
            f"{folder} seems to hold splits ({said}), and it cannot be told which file is of which: call the files or"
            " folders train, validation and test; or name the folder in it that has such files; or give each split's with"
            " train_tasks, validation_tasks and test_tasks. If these are tasks and no splits, give the folder as"
            " train_tasks."
        )


def _front_matter(card: Path) -> str:
    """What stands between two lines of dashes at the start of a dataset's card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text.split("\n---", 1)[0] if text.startswith("---") else ""
