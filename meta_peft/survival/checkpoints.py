"""Folders that are whole or not there: written aside, checksummed, renamed.

A checkpoint is a folder ``checkpoint-<step>`` with a manifest, ``files.json``, of every file's size and SHA-256. It gets
its name by a rename once everything is on the disk, so a killed process leaves a folder of another name. What a disk or a
hand does to it later shows in the manifest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from meta_peft.errors import MetaPeftError
from meta_peft.survival import training_state
from meta_peft.utils import digests

logger = logging.getLogger("meta_peft")

MANIFEST = "files.json"
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL, REPLACED = ".partial-", ".replaced-"
BEGUN = ".begun"  # an empty file whose time says when the job that writes here now began


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes into the folder that it is given; one that is there is replaced."""
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    clear_remains(parent)
    partial, replaced = parent / f"{PARTIAL}{folder.name}", parent / f"{REPLACED}{folder.name}"
    partial.mkdir()
    try:
        fill(partial)
        seal(partial)
    except Exception:  # most likely the disk is full, and would stay so
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    _to_disk(parent)
    shutil.rmtree(replaced, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the manifest of the files that are in `folder`, and wait until all is on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    found = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digests.of_file(path)}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for path in (*files, folder / MANIFEST, folder):
        _to_disk(path)


def check(folder: Path) -> None:
    """Raise `MetaPeftError` unless every file of the checkpoint is as it was written."""
    try:
        seal = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {str(name): (int(of["bytes"]), str(of["sha256"])) for name, of in seal.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MetaPeftError(
            f"{folder} is no whole checkpoint: {MANIFEST} is missing or damaged ({type(error).__name__}). Resume from"
            " another one, or with resume_from_checkpoint=True from the newest whole one."
        ) from error
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes instead of {size}"
        elif digests.of_file(path) != sha256:
            problem = "has another content than was written"
        else:
            continue
        raise MetaPeftError(
            f"{folder} is damaged: {name} {problem}. Resume from another checkpoint, or with resume_from_checkpoint=True"
            " from the newest whole one."
        )


def to_resume(asked: str | bool | None, parent: Path, *, attempt: int | None = None) -> Path | None:
    """The checkpoint that a run starts from; None for a new run.

    Args:
        asked: a folder, or True (as a word, too) for the newest whole one in `parent`.
        parent: where the run has its checkpoints.
        attempt: how often the launcher has started the job again; None for one that it never does. From the second
            attempt on, the newest whole checkpoint that the job itself has written comes before what was asked; an
            earlier job's in the same folder is left alone.

    Raises:
        MetaPeftError: the folder is no whole checkpoint, or there is none; or the one that was written last holds no
            training state, so that another run's would be taken for it.
    """
    begun = parent / BEGUN
    if attempt and begun.exists():
        clear_remains(parent)
        if own := newest_whole(parent, since=begun.stat().st_mtime):
            return own
    elif attempt is not None:
        parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if not asked:
        return None
    if not isinstance(asked, bool):
        check(Path(asked))
        return Path(asked)
    clear_remains(parent)
    found = newest_whole(parent)
    if found is None:
        raise MetaPeftError(f"There is no whole checkpoint in {parent} to resume from.")
    _check_none_later_without_state(parent, found)
    return found


def newest_whole(parent: Path, since: float = 0.0) -> Path | None:
    """The whole checkpoint of the highest step, of the run in `parent` that began last.

    The log says which newer ones are not whole.

    Args:
        parent: where the checkpoints are.
        since: only those that were written then or later, in seconds since 1970 by the file system's clock.
    """
    found = [path for path in _folders(parent) if path.stat().st_mtime >= since]
    named = [(int(match[1]), path) for path in found if (match := NAME.fullmatch(path.name))]
    for _, _, folder in sorted(((training_state.started(path), step, path) for step, path in named), reverse=True):
        try:
            check(folder)
        except MetaPeftError as error:
            logger.warning("%s It is passed over.", error)
        else:
            return folder
    return None


def _check_none_later_without_state(parent: Path, found: Path) -> None:
    """Raise if a whole checkpoint without a training state was written after `found`, which has one."""
    if not training_state.is_in(found):
        return
    last = max((path for path in _folders(parent) if NAME.fullmatch(path.name)), key=lambda path: path.stat().st_mtime)
    if training_state.is_in(last) or last.stat().st_mtime <= found.stat().st_mtime:
        return
    try:
        check(last)
    except MetaPeftError:
        return  # it is damaged, which the log says
    raise MetaPeftError(
        f"{last} was written last and has no training state (save_only_model): no run goes on from it, and {found}, which"
        f" has one, is older and may be of another run. To go on from that, name it: resume_from_checkpoint={found}; to"
        " start anew, leave resume_from_checkpoint out."
    )


def clear_remains(parent: Path) -> None:
    """Remove what a killed process left, and bring back a checkpoint that it was about to replace."""
    for path in _folders(parent):
        if path.name.startswith(REPLACED) and not (named := parent / path.name.removeprefix(REPLACED)).exists():
            os.replace(path, named)
        elif path.name.startswith((REPLACED, PARTIAL)):
            shutil.rmtree(path, ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened, and files only for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
