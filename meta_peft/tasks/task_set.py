"""Many small tasks: a table of rows and the name of the task that each row belongs to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoded_rows import TAGGING, RowEncoding
from meta_peft.tasks.encoding import Encoding
from meta_peft.tasks.prompt import SOUND, PromptFormat, example_columns, read_columns
from meta_peft.tasks.row_form import RowForm
from meta_peft.tasks.row_index import ERROR, LEAVE_OUT, full_rows, index_rows
from meta_peft.tasks.sound import check_sound
from meta_peft.tasks.sources import opened
from meta_peft.tasks.sources.class_names import with_class_names
from meta_peft.tasks.sources.opening import from_rows
from meta_peft.tasks.sources.text_files import existing
from meta_peft.tasks.text_columns import check_text
from meta_peft.utils.checked import shown

logger = logging.getLogger("meta_peft")

LARGE = 100_000  # rows; of a larger table only those are encoded that are drawn, if fewer than all of them are


class TaskSet:
    """Rows grouped by task.

    Args:
        dataset: a `datasets.Dataset` whose rows have a task column and are of one of the forms that `PromptFormat` knows.
        task_column: the column that names the task, or several of them, whose values together do.
        empty_rows: what becomes of rows without an input, an answer or a task: ``error`` or ``leave_out``.
        row_form: what was done to rows so that they are of such a form, for whoever reads others like them.

    Rows that repeat an earlier row of their task are left out, so that support and query can never share a row. The
    table stays on disk if it is there: of each row its number is kept.

    `names` are those of the tasks, in the order of their first rows, and `rows_of` has each one's row numbers. `dataset`
    is what episodes are made of, `table` the same rows before they were encoded: what was left out is in neither, so that
    nothing reads it again. `found` counts what was found in all rows; rows that were cut are counted once they are encoded,
    also as some of the tasks alone (`select`).
    """

    def __init__(
        self,
        dataset: Dataset,
        task_column: str | Sequence[str] = "task",
        *,
        empty_rows: str = ERROR,
        row_form: RowForm | None = None,
    ):
        self.row_form = row_form or RowForm()
        self.task_columns = (task_column,) if isinstance(task_column, str) else tuple(task_column)
        for column in self.task_columns:
            if column not in dataset.column_names:
                raise MetaPeftError(
                    f"Expected a column {column!r} that names the task of each row; the columns are"
                    f" {dataset.column_names}. Name the right one with task_column."
                )
        self.empty_rows = empty_rows
        needed, read = example_columns(dataset.column_names), read_columns(dataset.column_names)
        if needed in SOUND:
            check_sound(dataset.features)
        check_text(dataset, needed, read)
        named = with_class_names(dataset)
        self.encoding: Any = None  # an `Encoding`, of encoded tasks
        index = index_rows(named, self.task_columns, read, needed, empty_rows=empty_rows)
        table, self.rows_of = _without_left_out(named, index.rows_of)
        self.dataset = self.table = table
        self.names = list(self.rows_of)
        self.found = {
            "rows": len(dataset),
            "tasks": len(self.rows_of),
            "repeated_rows": index.repeated_rows,
            "empty_rows": index.empty_rows,
            "rows_in_several_tasks": index.rows_in_several_tasks,
            "single_label_tasks": index.single_label_tasks,
        }
        self._cut_rows: dict[str, int] = {}  # by task, which this set shares with those that are selected from it
        self._counts = [(self.names, self.found)]  # of this set, and of those that it was selected from

    @property
    def repeated_rows(self) -> int:
        """Rows that were left out because they repeat another one of their task."""
        return self.found["repeated_rows"]

    def __len__(self) -> int:
        return len(self.rows_of)

    def rows(self, task: str) -> list[dict[str, Any]]:
        return [self.dataset[int(i)] for i in self.rows_of[task]]

    def select(self, tasks: Iterable[str]) -> TaskSet:
        """These tasks alone, in this order."""
        return self._of({task: self.rows_of[task] for task in tasks})

    def _of(self, chosen: dict[str, np.ndarray]) -> TaskSet:
        """The rows with these numbers alone."""
        if not chosen:
            raise MetaPeftError("No tasks are left.")
        rows = np.concatenate(list(chosen.values()))
        ends = np.cumsum([len(part) for part in chosen.values()])
        selected = copy.copy(self)
        selected.rows_of = dict(zip(chosen, np.split(np.arange(len(rows)), ends[:-1]), strict=True))
        selected.names = list(chosen)
        selected.dataset, selected.table = self.dataset.select(rows), self.table.select(rows)
        selected.found = self.found | {"rows": len(rows), "tasks": len(chosen)}
        selected._counts = [*self._counts, (selected.names, selected.found)]
        selected.found.pop("cut_rows", None)  # of other tasks too
        selected._count_cut_rows()
        return selected

    def rows_with(self, column: str) -> dict[str, np.ndarray]:
        """The numbers of each task's rows that have something in `column`, which no row needs by itself.

        Raises:
            MetaPeftError: some have nothing there, and empty rows are not to be left out.
        """
        full = full_rows(self.table, column)
        if not full.all() and self.empty_rows != LEAVE_OUT:
            task, row = next((task, row) for task, rows in self.rows_of.items() for row in rows if not full[row])
            raise MetaPeftError(
                f"Task {task!r} has a row with nothing in the column {column!r}, {shown(self.table[int(row)])}: fill it, or"
                " leave such rows out with empty_rows: leave_out."
            )
        return {task: rows[full[rows]] for task, rows in self.rows_of.items()}

    def having(self, column: str) -> TaskSet:
        """The tasks without the rows that have nothing in `column`: `found` counts them as empty (see `rows_with`)."""
        rows_of = {task: rows for task, rows in self.rows_with(column).items() if len(rows)}
        empty = sum(map(len, self.rows_of.values())) - sum(map(len, rows_of.values()))
        if not empty:
            return self
        full = self._of(rows_of)
        full.found |= {"rows": self.found["rows"], "empty_rows": self.found["empty_rows"] + empty}
        return full

    def enough(self, shots: int, query_size: int) -> list[str]:
        """The tasks that have rows enough for an episode."""
        return [task for task, rows in self.rows_of.items() if len(rows) >= shots + query_size]

    def only(self, tasks: Sequence[str]) -> TaskSet:
        """These tasks, because the others are too small: `found` counts how many those are."""
        if len(tasks) == len(self):
            return self
        if not tasks:
            raise MetaPeftError(
                f"None of the {len(self)} tasks has rows enough for an episode: lower shots, query_size or ways."
            )
        selected = self.select(tasks)
        selected.found["small_tasks"] = len(self) - len(tasks)
        return selected

    def check_rows(self, shots: int, query_size: int) -> None:
        """Raise unless every task has rows enough for one episode."""
        for task, rows in self.rows_of.items():
            if len(rows) < shots + query_size:
                raise MetaPeftError(
                    f"Task {task!r} has {len(rows)} distinct rows, but an episode takes {shots} support rows and"
                    f" {query_size} query rows ({shots + query_size} in all). Lower shots or query_size, or leave the"
                    " task out (small_tasks: leave_out)."
                )

    def query_size(self, shots: int, most: int | None = None) -> int:
        """Query rows that every task can give besides its support rows: `most`, or what the smallest task has left."""
        left = max(1, min(len(rows) for rows in self.rows_of.values()) - shots)
        return left if most is None else min(most, left)

    def check_disjoint(self, other: TaskSet, names: tuple[str, str] = ("training", "evaluation")) -> None:
        """Raise if a task is in both sets."""
        shared = sorted(set(self.rows_of) & set(other.rows_of))
        if shared:
            raise MetaPeftError(
                f"{len(shared)} tasks are in both the {names[0]} and the {names[1]} tasks, {shared[0]!r} for one: what"
                " is measured on them is memory, not adaptation. Keep the sets apart, or have them made of one"
                " (split_fractions)."
            )

    def split(self, fractions: Sequence[float], seed: int = 0) -> tuple[TaskSet, ...]:
        """The tasks in as many parts as `fractions`, which add up to 1; the seed decides which task is where.

        Where a task is a class (the task column is the label), so are the parts: no class is in two of them.
        """
        names, order = self.names, np.random.default_rng(seed).permutation(len(self))
        ends = np.rint(np.cumsum(fractions) * len(names)).astype(int)
        parts = np.split(order, ends[:-1])
        if not all(len(part) for part in parts):
            raise MetaPeftError(
                f"{len(names)} tasks cannot be split into {', '.join(f'{share:g}' for share in fractions)} of them: a"
                " part would have none. Give other split_fractions, or more tasks."
            )
        return tuple(self.select(names[i] for i in sorted(part)) for part in parts)

    def encoded(
        self,
        how: Encoding | PromptFormat,
        tokenizer: Any = None,
        max_length: int = 256,
        *,
        rows_drawn: int | None = None,
        num_proc: int | None = None,
    ) -> TaskSet:
        """The same tasks with features, such as `input_ids` and `labels`, in place of text.

        Rows are encoded once, by `num_proc` processes, and found again by the next run if the table is on disk. Of a
        large table of which a run draws but few rows (`rows_drawn`), rows are encoded when they are drawn.

        Args:
            how: an `Encoding`; or a `PromptFormat`, with the tokenizer and the longest row in tokens, where a causal
                language model is to read the rows.
        """
        encoding = Encoding("causal_lm", how, tokenizer, max_length) if isinstance(how, PromptFormat) else how
        encoded = copy.copy(self)
        encoded.encoding = encoding
        rows = RowEncoding(encoding.of_tasks(self.rows, self.names), self.task_columns)
        if rows_drawn is not None and len(self.dataset) > LARGE and rows_drawn < len(self.dataset):
            encoded.dataset = rows.when_drawn(self.dataset)
            return encoded
        encoded.dataset, was_cut = rows.of_table(self.dataset, num_proc)
        self._cut_rows |= {task: int(was_cut[its].sum()) for task, its in self.rows_of.items()}
        self._count_cut_rows()
        if was_cut.any():
            lost = "words at their end" if encoding.objective == TAGGING else "the start of their prompt"
            logger.warning(
                "%d of %d rows are longer than max_length=%d and lost %s.",
                *(was_cut.sum(), len(was_cut), encoding.max_length, lost),
            )
        return encoded

    def _count_cut_rows(self) -> None:
        """What is known by now of the tasks of this set, and of those that it was selected from."""
        for names, found in self._counts:
            known = [self._cut_rows[name] for name in names if name in self._cut_rows]
            if known:
                found["cut_rows"] = sum(known)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], task_column: str | Sequence[str] = "task") -> TaskSet:
        """From an iterable of dicts."""
        return cls(from_rows(rows), task_column)

    @classmethod
    def from_mapping(cls, tasks: Mapping[str, Iterable[Mapping[str, Any]]]) -> TaskSet:
        """From ``{task: rows}``."""
        return cls.of(tasks)

    @classmethod
    def from_jsonl(cls, path: str | Path, task_column: str | Sequence[str] = "task") -> TaskSet:
        """From a file with one JSON object a line."""
        return cls.of(existing(path), task_column)

    @classmethod
    def of(
        cls,
        source: Any,
        task_column: str | Sequence[str] = "task",
        *,
        empty_rows: str = ERROR,
        row_form: RowForm | None = None,
    ) -> TaskSet:
        """From whatever holds tasks: a `TaskSet`, or what `meta_peft.tasks.sources.opening` takes.

        With a `row_form`, rows that are in the form of an earlier run are brought into the one that it made of them.
        """
        if isinstance(source, TaskSet):
            return source
        columns = [task_column] if isinstance(task_column, str) else list(task_column)
        table = opened(source, columns[0])
        if row_form is not None:
            table, columns = row_form.of_table(table, columns)
        return cls(table, columns, empty_rows=empty_rows, row_form=row_form)


def _without_left_out(table: Dataset, rows_of: dict[str, np.ndarray]) -> tuple[Dataset, dict[str, np.ndarray]]:
    """The table of the rows that tasks have, and their numbers there. What is on disk is not copied."""
    kept = np.sort(np.concatenate(list(rows_of.values())))
    if len(kept) == len(table):
        return table, rows_of
    return table.select(kept), {task: np.searchsorted(kept, rows) for task, rows in rows_of.items()}
