"""Your own recordings as tasks for the speech recipe: python recipes/data/recordings.py [FOLDER] --from DIR

DIR/SPLIT/TASK/NAME.wav is a recording and NAME.txt beside it what is said. SPLIT is train, validation or test; a task
is what you want to adapt to, such as one speaker, one dialect or one kind of call.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from family import SHARES, Tasks, run
from sound import samples_of, write_clip

from meta_peft.errors import MetaPeftError

SOURCE = "# Recordings\n\nYour own."


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(options.recordings, options.folder)


def tasks_of(recordings: Path, folder: Path) -> dict[str, Tasks]:
    """Tasks by split; clips at 16 kHz go to `folder`."""
    splits: dict[str, Tasks] = {part: {} for part in SHARES}
    for recording in sorted(recordings.glob("*/*/*.wav")):
        part, task = recording.parts[-3:-1]
        words = recording.with_suffix(".txt")
        if part not in splits or not words.is_file():
            raise MetaPeftError(
                f"{recording}: expected {recordings}/SPLIT/TASK/NAME.wav with NAME.txt beside it, SPLIT one of"
                f" {', '.join(splits)}."
            )
        row = {
            "audio": write_clip(samples_of(recording.read_bytes()), folder, f"{part}/{task}/{recording.name}"),
            "text": " ".join(words.read_text(encoding="utf-8").split()),
        }
        splits[part].setdefault(task, []).append(row)
    if not any(splits.values()):
        raise MetaPeftError(f"There is no recording in {recordings}: expected SPLIT/TASK/NAME.wav in it.")
    return splits


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--from", dest="recordings", type=Path, required=True, metavar="DIR", help="the recordings")


def main(words: list[str] | None = None) -> int:
    return run("speech", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
