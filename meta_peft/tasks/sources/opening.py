"""A table from whatever rows are kept in: a file, several, a folder, a saved dataset, a hub id, a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
)

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.tasks.plain import plain_row
from meta_peft.tasks.sources.arrow_cache import no_table, table_of, uncached
from meta_peft.tasks.sources.class_names import name_classes
from meta_peft.tasks.sources.folders import saved, table_of_paths
from meta_peft.tasks.sources.split_files import SPLIT_NAMES, split_files
from meta_peft.tasks.sources.text_files import READERS
from meta_peft.utils.checked import shown

SPLITS = ("train", "validation", "test")


def opened(source: Any, task_column: str = "task") -> Dataset:
    """The rows of `source` as one table.

    Args:
        source: a `Dataset`; an `IterableDataset`, which is written to disk once; a mapping of task names to rows or
            datasets, a `DatasetDict` for one; the path of a file, a folder, or several of them; or rows.
        task_column: is added where `source` has one file or one dataset for each task, with the name of that.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, IterableDataset):
        return streamed(source)
    if isinstance(source, (str, Path)):
        return table_of_paths([source], task_column)
    if isinstance(source, Mapping):
        return _from_mapping(source, task_column)
    source = source if isinstance(source, (list, tuple)) else _first_seen(source)
    if isinstance(source, (list, tuple)) and source and all(isinstance(path, (str, Path)) for path in source):
        return table_of_paths(source, task_column)
    return from_rows(source)


def from_rows(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """A table of rows that are in memory already; of an iterator's rows, on disk."""
    if not isinstance(rows, (list, tuple)):
        return uncached(_objects(rows))
    table = table_of(list(_objects(rows)))
    return Dataset(table) if len(table) else uncached([])


def rows_of_task(rows: Any) -> list[Mapping[str, Any]]:
    """The rows of one task as they are learned: classes that a dataset keeps as numbers by their names.

    Raises:
        MetaPeftError: these are no rows.
    """
    if isinstance(rows, (str, Mapping)):
        raise MetaPeftError(f"Expected the rows of a task, got {shown(rows)}: give a list of rows, or a dataset.")
    named = name_classes(rows.features if isinstance(rows, (Dataset, IterableDataset)) else None)
    return [named(row) for row in _objects(_first_seen(rows))]


def streamed(stream: IterableDataset, max_rows: int | None = None) -> Dataset:
    """The rows of a stream, at most `max_rows` of them, written to disk once."""
    for column, kind in (stream.features or {}).items():
        if isinstance(kind, Audio):
            stream = stream.cast_column(column, Audio(decode=False))
    named = name_classes(stream.features)
    return uncached(map(named, stream if max_rows is None else stream.take(max_rows)))


def opened_splits(
    name: str,
    config: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    *,
    task_column: str = "task",
    streaming: bool = False,
    max_rows: int | None = None,
) -> dict[str, Dataset]:
    """The splits of a dataset that holds them all, by our names for them: train, validation and test.

    Args:
        name: a hub id; a folder that `save_to_disk` wrote; a folder whose files or subfolders, or those of its
            folder ``data``, are named after their splits, such as ``train.jsonl`` (see `split_files`); or else a file
            or folder, all of which is the split train.
        config: the hub's name for one of several datasets under one id.
        splits: what the dataset calls each split; None is our name, if there is such a split.
        streaming: read the hub's rows one after the other, and not whole files first.
        max_rows: of a stream, only so many first rows.
    """
    wanted = dict.fromkeys(SPLITS) | dict(splits or {})
    found = _splits(name, config, task_column, streaming)
    taken: dict[str, Dataset] = {}
    for split, called in wanted.items():
        if called is None and split != "train" and split not in found:
            continue
        called = called or split
        if called not in found:
            raise MetaPeftError(
                f"{name} has no split {called!r}; its splits are {', '.join(map(str, found))}."
                f"{did_you_mean(called, map(str, found))} Name it with dataset_{split}_split."
            )
        table = found[called]()
        taken[split] = streamed(table, max_rows) if isinstance(table, IterableDataset) else table
    return taken


def _splits(name: str, config: str | None, task_column: str, streaming: bool) -> dict[str, Callable[[], Any]]:
    """What opens each split, by the name that it has in the dataset."""
    path = Path(name)
    if streaming and path.exists():
        raise MetaPeftError(f"streaming is for datasets of the hub, and {name} is here: leave it out.")
    if path.is_dir():
        whole = saved(path)
        if isinstance(whole, DatasetDict):
            return {str(split): lambda table=table: table for split, table in whole.items()}  # type: ignore[misc]
        splits = split_files(path) if whole is None else {}
        if splits:
            return {s: partial(table_of_paths, files, task_column, parts=True) for s, files in splits.items()}
    if path.exists() or path.suffix in READERS:
        return {"train": lambda: table_of_paths([path], task_column)}
    try:
        loaded = load_dataset(name, config, streaming=streaming)
    except Exception as error:  # of many kinds: no such id, no such config, no network, files of another format
        raise MetaPeftError(
            f"The dataset {name!r} cannot be loaded ({shown(str(error))}): dataset_name is a hub id, with dataset_config"
            " where it has several, or a file or folder that is here."
        ) from error
    assert isinstance(loaded, (DatasetDict, IterableDatasetDict))
    return {str(split): lambda table=table: table for split, table in loaded.items()}  # type: ignore[misc]


def _from_mapping(tasks: Mapping[str, Any], task_column: str) -> Dataset:
    if isinstance(tasks, DatasetDict) and set(map(str, tasks)) & set(SPLIT_NAMES):
        raise MetaPeftError(
            f"This DatasetDict holds splits ({', '.join(map(str, tasks))}), and a set of tasks is one of them: give"
            " tasks['train'], say."
        )
    if tasks and all(isinstance(table, Dataset) for table in tasks.values()):
        tables = []
        for name, table in tasks.items():
            inside = table.unique(task_column) if task_column in table.column_names else []
            if len(inside) > 1:
                raise MetaPeftError(
                    f"The dataset {str(name)!r} holds several tasks of its own ({shown(inside[:5])}), and in a mapping each"
                    " dataset is one task: give one dataset of all rows, or rename or remove its task column."
                )
            table = table.remove_columns([c for c in table.column_names if c == task_column])
            tables.append(table.add_column(task_column, [str(name)] * len(table)))
        try:
            return concatenate_datasets(tables)
        except (ValueError, TypeError) as error:
            raise no_table(f"the datasets of the tasks differ: {shown(str(error))}") from error
    return from_rows([{**row, task_column: name} for name, rows in tasks.items() for row in rows_of_task(rows)])


def _first_seen(rows: Any) -> Any:
    if not isinstance(rows, Iterable):
        raise MetaPeftError(
            f"Expected tasks, got {shown(rows)}: a dataset, a mapping of task names to rows, rows, or the path of a file."
        )
    return rows


def _objects(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise no_table(f"row {number} is {shown(row)}")
        yield plain_row(row)
