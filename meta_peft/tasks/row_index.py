"""Which rows of a table each task has, found by reading the table once, some rows at a time.

Kept are 16 bytes for each row: the number of its task, and a hash of its example, by which repeated rows are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.turns import empty_turn
from meta_peft.tasks.written import written
from meta_peft.utils.checked import one_of, shown

ROWS_AT_ONCE = 10_000
ERROR, LEAVE_OUT = LEFT_OUT_OR_NOT = ("error", "leave_out")  # what becomes of rows, and tasks, that are of no use


@dataclass(frozen=True)
class RowIndex:
    """Row numbers by task, in the order of the table; how many are not among them, and what is odd about the others."""

    rows_of: dict[str, np.ndarray]
    repeated_rows: int
    empty_rows: int
    rows_in_several_tasks: int
    single_label_tasks: int


def index_rows(
    dataset: Dataset,
    task_columns: Sequence[str],
    example_columns: Sequence[str],
    needed: Sequence[str],
    *,
    empty_rows: str = ERROR,
) -> RowIndex:
    """Group rows by the values of `task_columns`; repetitions of `example_columns` in a task are left out.

    A row is empty if one of the columns `needed` has nothing in it, or if it names no task. Then it is an error, or with
    ``empty_rows="leave_out"`` left out and counted.
    """
    one_of("empty_rows", empty_rows, LEFT_OUT_OR_NOT)
    code_of: dict[tuple[Any, ...], int] = {}
    codes, hashes, labels, full = [], [], [], []
    columns = list(dict.fromkeys([*task_columns, *example_columns]))
    labelled = "label" in example_columns and "label" not in task_columns
    done = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        table = table.combine_chunks()
        full.append(_is_full(table, task_columns, needed, done, empty_rows))
        values = (table[column].to_pylist() for column in task_columns)
        codes.append(np.fromiter((code_of.setdefault(v, len(code_of)) for v in zip(*values)), np.int64, len(table)))  # noqa: B905
        hashes.append(hash_rows([table[column] for column in example_columns], len(table)))
        labels.append(hash_rows([table["label"]], len(table)) if labelled else np.arange(done, done + len(table)))
        done += len(table)
    if not done or not any(part.any() for part in full):
        raise MetaPeftError("There are no rows, so there is no task to learn from.")
    return _grouped(_names(list(code_of)), *(np.concatenate(parts) for parts in (codes, hashes, labels, full)))


def full_rows(dataset: Dataset, column: str) -> np.ndarray:
    """Whether each row has something in `column`."""
    parts = dataset.select_columns([column]).with_format("arrow").iter(ROWS_AT_ONCE)
    return ~np.concatenate([_is_empty(table[column]) for table in parts])


def hash_rows(columns: Sequence[pa.ChunkedArray], rows: int) -> np.ndarray:
    """64 bits for each row, the same in every process: equal rows have equal ones, and others by a chance of 2^-64."""
    total = np.zeros(rows, np.uint64)
    for column in columns:
        total = total * np.uint64(0x9E3779B97F4A7C15) + pd.util.hash_array(_as_text(column), categorize=False)
    return total


def _as_text(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        values = [json.dumps(value, sort_keys=True, default=str) for value in column.to_pylist()]
    else:
        values = column.cast(pa.string()).to_pylist()
    return np.array(["" if value is None else value for value in values], dtype=object)


def _grouped(names: list[str], codes: np.ndarray, hashes: np.ndarray, labels: np.ndarray, full: np.ndarray) -> RowIndex:
    rows = np.flatnonzero(full)
    order = rows[np.lexsort((hashes[rows], codes[rows]))]  # stable: of equal rows the first one is first
    again = (codes[order][1:] == codes[order][:-1]) & (hashes[order][1:] == hashes[order][:-1])
    kept = np.sort(order[np.append(True, ~again)])
    by_task = kept[np.argsort(codes[kept], kind="stable")]
    ends = np.cumsum(np.bincount(codes[kept], minlength=len(names)))
    rows_of = {name: part for name, part in zip(names, np.split(by_task, ends[:-1]), strict=True) if len(part)}
    times = np.unique(hashes[kept], return_counts=True)[1]
    return RowIndex(
        rows_of,
        repeated_rows=int(again.sum()),
        empty_rows=int((~full).sum()),
        rows_in_several_tasks=int(times[times > 1].sum()),
        single_label_tasks=sum(
            len(rows) > 1 and bool((labels[rows] == labels[rows[0]]).all()) for rows in rows_of.values()
        ),
    )


def task_name(values: Iterable[Any]) -> str:
    """The name of the task that has these values in the task columns."""
    return " / ".join(map(written, values))


def _names(values: list[tuple[Any, ...]]) -> list[str]:
    names = list(map(task_name, values))
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise MetaPeftError(
            f"Two tasks would have the name {shown(twice)}: change a value, or name them in one column."
        )
    return names


def _is_full(table: pa.Table, tasks: Sequence[str], needed: Sequence[str], done: int, empty_rows: str) -> np.ndarray:
    """Whether each row has something in every column that it needs."""
    full = np.ones(len(table), bool)
    for column in dict.fromkeys([*tasks, *needed]):
        kind = table.schema.field(column).type
        if column in tasks and pa.types.is_nested(kind):
            raise _no_task(done, table[column][0].as_py(), column)
        empty = _is_empty(table[column])
        if empty.any() and empty_rows != LEAVE_OUT:
            row = int(np.flatnonzero(empty)[0])
            if column in tasks:
                raise _no_task(done + row, table[column][row].as_py(), column)
            turn = empty_turn(table[column][row].as_py())
            found = f"a turn without content, {shown(turn)}," if turn else "nothing"
            raise MetaPeftError(
                f"Row {done + row + 1} has {found} in the column {column!r}: fill it, or leave such rows out with"
                " empty_rows: leave_out."
            )
        full &= ~empty
    return full


def _is_empty(column: pa.ChunkedArray) -> np.ndarray:
    empty = pc.is_null(column, nan_is_null=True)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        empty = pc.or_(empty, pc.fill_null(pc.equal(column, pa.scalar("", kind)), False))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        empty = pc.or_(empty, pc.fill_null(pc.equal(pc.list_value_length(column), 0), False))
        if pa.types.is_struct(kind.value_type):  # a conversation
            return np.array([empty_turn(turns) is not None for turns in column.to_pylist()]) | np.asarray(empty, bool)
    return np.asarray(empty.to_numpy(), bool)


def _no_task(before: int, value: Any, column: str) -> MetaPeftError:
    return MetaPeftError(
        f"Row {before + 1} has {shown(value)} in the column {column!r}: name its task, as a text or a number."
    )
