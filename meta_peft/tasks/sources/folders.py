"""Files and folders of rows as one table, in which rows that name no task are of the task that their file is called."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources.arrow_cache import cached, key_of_files
from meta_peft.tasks.sources.text_files import READERS, existing, rows_of_file
from meta_peft.utils.checked import shown

logger = logging.getLogger("meta_peft")

ENDS = ", ".join(READERS)
NAMED_IN_LOG = 3  # files
TaskFile = tuple[str | None, Path]  # a file, and the task of its rows that name none


def table_of_paths(paths: Sequence[str | Path], task_column: str, *, parts: bool = False) -> Dataset:
    """One table of all files. Where there may be several, rows without the task column are of the task of their file.

    Args:
        parts: files that stand in `paths` are parts of one, and name no task.
    """
    named = len(paths) > 1 and not parts
    files: list[TaskFile] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append((path.stem if named else None, existing(path)))
            continue
        table = saved(path)
        if isinstance(table, DatasetDict):
            raise MetaPeftError(
                f"{path} holds the splits {', '.join(map(str, table))}: give it as dataset_name, or one of them."
            )
        if table is not None and len(paths) > 1:
            raise MetaPeftError(f"{path} is a saved dataset, which is given alone: as files, several can be given.")
        if table is not None:
            return table
        files += _of_folder(path)
    names = [repr(name) for name, _ in files]
    places = [str(path.parent.resolve()) for _, path in files]  # of sounds that rows name
    key = [key_of_files(path for _, path in files), *names, *places, task_column]
    return cached("\0".join(key), partial(_rows, files, task_column))


def files_below(folder: Path) -> list[Path]:
    """All files but hidden ones: editors and systems keep copies of files in those."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def holds_rows(file: Path) -> bool:
    return file.suffix.lower() in READERS


def say_not_read(folder: Path, files: Sequence[Path], why: str) -> None:
    """One line about files that somebody may think are read."""
    if files:
        names = [file.relative_to(folder).as_posix() for file in files[:NAMED_IN_LOG]]
        more = ["..."] if len(files) > NAMED_IN_LOG else []
        said = "1 file is" if len(files) == 1 else f"{len(files)} files are"
        logger.info("%s: %s not read, %s: %s", folder, said, why, ", ".join(names + more))


def saved(folder: Path) -> Dataset | DatasetDict | None:
    """What `save_to_disk` wrote there, if it did."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # JSON, Arrow and the system each have their own
        raise MetaPeftError(f"{folder} is damaged or not a saved dataset ({shown(str(error))}).") from error


def _of_folder(folder: Path) -> list[TaskFile]:
    files = files_below(folder)
    say_not_read(folder, [file for file in files if not holds_rows(file)], f"of another kind than {ENDS}")
    found: list[TaskFile] = [
        (file.relative_to(folder).with_suffix("").as_posix(), file) for file in files if holds_rows(file)
    ]
    if not found:
        raise MetaPeftError(f"The folder {folder} has no file that ends with {ENDS}.")
    return found


def _rows(files: Sequence[TaskFile], task_column: str) -> Iterator[Mapping[str, Any]]:
    twins = {name for name, n in Counter(name for name, _ in files if name is not None).items() if n > 1}
    before: set[str] = set()
    for name, path in files:
        columns: set[str] = set()
        for row in rows_of_file(path):
            if name in twins and task_column not in row:
                raise MetaPeftError(
                    f"Two files would be the task {name!r}, {path} for one: rename one, or give their rows a task column"
                    f" ({task_column!r})."
                )
            columns.update(row)
            yield row if name is None else {task_column: name, **row}
        columns.discard(task_column)
        if columns and before and columns.isdisjoint(before):  # as of a README.txt among tables
            raise MetaPeftError(
                f"{path} has the columns {shown(sorted(columns))}, and no file before it, such as {files[0][1]}, has any of"
                f" them: those have {shown(sorted(before))}. Take the file that holds no tasks away, or name those that do."
            )
        before |= columns
