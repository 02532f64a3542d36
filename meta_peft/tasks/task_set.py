"""Many small tasks: a table of rows and the name of the task that each row belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException

from meta_peft.checked import shown
from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoding import Encoding
from meta_peft.tasks.multiple_choice import CHOICES
from meta_peft.tasks.prompt import PromptFormat, example_columns


class TaskSet:
    """Rows grouped by task.

    Args:
        dataset: a `datasets.Dataset` whose rows have a task column and one of the column pairs that `PromptFormat`
            reads (prompt/completion, input/target, text/label, question/answer, or messages).
        task_column: the column that names the task.

    Rows that repeat an earlier row of their task are left out, so that support and query can never share a row.
    """

    def __init__(self, dataset: Dataset, task_column: str = "task"):
        if task_column not in dataset.column_names:
            raise MetaPeftError(
                f"Expected a column {task_column!r} that names the task of each row; the columns are"
                f" {dataset.column_names}. Name the right one with task_column."
            )
        columns = [*example_columns(dataset.column_names), *({CHOICES} & set(dataset.column_names))]
        self.dataset = dataset
        self.task_column = task_column
        self.rows_of: dict[str, list[int]] = {}
        seen: set[tuple[str, str]] = set()
        examples = dataset.select_columns(columns)
        for i, (task, row) in enumerate(zip(dataset[task_column], examples, strict=True)):
            if task is None or task == "" or isinstance(task, (list, dict)):
                raise MetaPeftError(
                    f"Row {i + 1} has {shown(task)} in the column {task_column!r}: name its task, as a text or a number."
                )
            key = (str(task), json.dumps(row, sort_keys=True, default=str))
            if key not in seen:
                seen.add(key)
                self.rows_of.setdefault(str(task), []).append(i)
        if not self.rows_of:
            raise MetaPeftError("There are no rows, so there is no task to learn from.")
        self.repeated_rows = len(dataset) - len(seen)

    @property
    def names(self) -> list[str]:
        return list(self.rows_of)

    def __len__(self) -> int:
        return len(self.rows_of)

    def rows(self, task: str) -> list[dict[str, Any]]:
        return [self.dataset[i] for i in self.rows_of[task]]

    def select(self, tasks: Iterable[str]) -> TaskSet:
        """These tasks alone, in this order."""
        indices = [i for task in tasks for i in self.rows_of[task]]
        return TaskSet(self.dataset.select(indices), self.task_column)

    def check_rows(self, shots: int, query_size: int) -> None:
        """Raise unless every task has rows enough for one episode."""
        for task, rows in self.rows_of.items():
            if len(rows) < shots + query_size:
                raise MetaPeftError(
                    f"Task {task!r} has {len(rows)} distinct rows, but an episode takes {shots} support rows and"
                    f" {query_size} query rows ({shots + query_size} in all). Lower shots or query_size, or leave the"
                    " task out."
                )

    def check_disjoint(self, other: TaskSet, names: tuple[str, str] = ("training", "evaluation")) -> None:
        """Raise if a task is in both sets."""
        shared = sorted(set(self.rows_of) & set(other.rows_of))
        if shared:
            raise MetaPeftError(
                f"{len(shared)} tasks are in both the {names[0]} and the {names[1]} tasks, {shared[0]!r} for one: what"
                " is measured on them is memory, not adaptation. Keep the sets apart."
            )

    def encoded(self, how: Encoding | PromptFormat, tokenizer: Any = None, max_length: int = 256) -> TaskSet:
        """The same tasks with features, such as `input_ids` and `labels`, in place of text; encoded once.

        `how` may be a `PromptFormat`, with the tokenizer and the longest row in tokens, where a causal language model is
        to read the rows.
        """
        if isinstance(how, PromptFormat):
            how = Encoding("causal_lm", how, tokenizer, max_length)
        of_task = how.of_tasks(self.rows, self.names)
        encoded = self.dataset.map(
            lambda row: of_task[str(row[self.task_column])](row),
            remove_columns=[c for c in self.dataset.column_names if c != self.task_column],
            desc="encoding",
        )
        if "input_features" in encoded.column_names:  # as lists of numbers they would be slow
            encoded = encoded.with_format("numpy", columns=["input_features"], output_all_columns=True)
        copy = object.__new__(TaskSet)
        copy.__dict__.update(self.__dict__, dataset=encoded)
        return copy

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], task_column: str = "task") -> TaskSet:
        """From an iterable of dicts."""
        try:
            rows = [dict(row) for row in rows]
            if any(_has_nul_in_names(row) for row in rows):  # Arrow would cut the names there
                raise MetaPeftError("A column has a name with a NUL character: rename it.")
            dataset = Dataset.from_list(rows)
        except MetaPeftError:
            raise
        except (ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise MetaPeftError(
                f"The rows do not make a table ({shown(str(error))}): each must have columns, and a column the same kind"
                " of value in every row, text for one."
            ) from error
        return cls(dataset, task_column)

    @classmethod
    def from_mapping(cls, tasks: Mapping[str, Iterable[Mapping[str, Any]]]) -> TaskSet:
        """From ``{task: rows}``."""
        return cls.from_rows({**row, "task": name} for name, rows in tasks.items() for row in rows)

    @classmethod
    def from_jsonl(cls, path: str | Path, task_column: str = "task") -> TaskSet:
        """From a file with one JSON object a line."""
        return cls.from_rows(read_jsonl(path), task_column)

    @classmethod
    def of(cls, source: Any, task_column: str = "task") -> TaskSet:
        """From whatever holds tasks: a `TaskSet`, a `datasets.Dataset`, a mapping, rows, or the path of a JSONL file."""
        if isinstance(source, TaskSet):
            return source
        if isinstance(source, Dataset):
            return cls(source, task_column)
        if isinstance(source, (str, Path)):
            return cls.from_jsonl(source, task_column)
        if isinstance(source, Mapping):
            return cls.from_mapping(source)
        return cls.from_rows(source, task_column)


def _has_nul_in_names(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any("\0" in str(name) or _has_nul_in_names(part) for name, part in value.items())
    return isinstance(value, list) and any(map(_has_nul_in_names, value))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a bad line is named by its number."""
    path = Path(path)
    if not path.is_file():
        raise MetaPeftError(f"There is no file {str(path)!r}.")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would split at U+2028 inside a string too
    except UnicodeDecodeError as error:
        raise MetaPeftError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # integers of thousands of digits and deep nesting too
            raise MetaPeftError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)}).") from error
        if not isinstance(row, dict):
            raise MetaPeftError(f"{path}, line {number}: expected an object with columns, got {line[:60]!r}.")
        rows.append(row)
    if not rows:
        raise MetaPeftError(f"{path} has no rows.")
    return rows
