"""The tasks of a run, as its options say: opened, brought into one form, split and checked, before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from meta_peft.config import MetaLoraConfig, TaskArguments
from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.processes import group
from meta_peft.tasks import TaskSet, translation
from meta_peft.tasks.labelling import large_enough
from meta_peft.tasks.leakage import check_leakage
from meta_peft.tasks.row_form import RowForm, with_new_names
from meta_peft.tasks.self_supervised import self_supervised
from meta_peft.tasks.sources import opened, opened_splits

logger = logging.getLogger("meta_peft")

DEMO = ("locale_formatting", ["locale_formatting"])  # one path is read as a text
OF_OWN_TASKS = (
    *("validation_tasks", "test_tasks", "split_fractions", "rename_columns"),
    *("source_lang", "target_lang", "self_supervised"),
)
SMALL = "small_tasks"
WORDS = {
    "repeated_rows": "repeated rows left out",
    "empty_rows": "empty rows left out",
    "rows_in_several_tasks": "rows that are in several tasks",
    "single_label_tasks": "tasks with one label only, which teach to say it",
    SMALL: "tasks left out, which have too few rows or classes",
}


def load_tasks(task_args: TaskArguments, task_column: str | Sequence[str] = "task") -> dict[str, TaskSet]:
    """Tasks by split, each pair of splits disjoint."""
    columns = [task_column] if isinstance(task_column, str) else list(task_column)
    if task_args.dataset_name is None and task_args.train_tasks in DEMO:
        from meta_peft.tasks.locale_formatting import locale_formatting

        if given := [option for option in OF_OWN_TASKS if getattr(task_args, option)]:
            raise MetaPeftError(
                f"{given[0]} is of tasks of your own, and the demo, which train_tasks names, has all its splits: name your"
                " tasks with train_tasks or dataset_name, or leave it out."
            )
        return dict(locale_formatting())
    tables = {split: _in_form(table, task_args, columns[0]) for split, table in _tables(task_args, columns[0]).items()}
    if task_args.self_supervised == "smlmt":
        columns = ["label"]
    tasks = {
        split: TaskSet(table, columns, empty_rows=task_args.empty_rows, row_form=form)
        for split, (table, form) in tables.items()
    }
    if task_args.split_fractions is not None:
        parts = tasks["train"].split(task_args.split_fractions, task_args.split_seed)
        tasks = dict(zip(("train", "validation", "test"), parts, strict=True))
    splits = list(tasks)
    for i, split in enumerate(splits):
        for other in splits[i + 1 :]:
            tasks[split].check_disjoint(tasks[other], (split, other))
    return tasks


def with_enough_rows(tasks: dict[str, TaskSet], task_args: TaskArguments, args: MetaLoraConfig) -> dict[str, TaskSet]:
    """The tasks that episodes can be drawn of; says what was found in the data.

    Raises:
        MetaPeftError: there are others, and ``small_tasks`` does not say to leave them out.
    """
    labels, checked = args.labelling(), {}
    if task_args.split_fractions is not None:  # all rows were read together
        _say_found("all tasks", tasks["train"], set(WORDS))
    for split, of_split in tasks.items():
        query_size = args.query_size if split == "train" else 1
        checked[split] = of_split = large_enough(of_split, labels, args.shots, query_size, task_args.small_tasks)
        _say_found(split, of_split, set(WORDS) if task_args.split_fractions is None else {SMALL})
    return checked


def _say_found(where: str, tasks: TaskSet, names: set[str]) -> None:
    said = [f"{n} {WORDS[name]}" for name, n in tasks.found.items() if n and name in names]
    if said:
        logger.info("%s: %s.", where, ", ".join(said))


def run_tasks(task_args: TaskArguments, args: MetaLoraConfig) -> tuple[dict[str, TaskSet], dict[str, Any]]:
    """The tasks of a run by split, and what was found about tasks that are in two splits (see `tasks.leakage`)."""
    tasks = load_tasks(task_args, args.task_column)
    leakage = group.of_first(partial(check_leakage, tasks, args.task_leakage))
    return with_enough_rows(tasks, task_args, args), leakage.to_dict()


def _tables(task_args: TaskArguments, task_column: str) -> dict[str, Dataset]:
    if task_args.dataset_name is None:
        named = {"train": task_args.train_tasks, "validation": task_args.validation_tasks, "test": task_args.test_tasks}
        return {split: opened(paths, task_column) for split, paths in named.items() if paths}
    called = {
        "train": task_args.dataset_train_split,
        "validation": task_args.dataset_validation_split,
        "test": task_args.dataset_test_split,
    }
    tables = opened_splits(
        task_args.dataset_name,
        task_args.dataset_config,
        called,
        task_column=task_column,
        streaming=task_args.streaming,
        max_rows=task_args.max_rows,
    )
    return {"train": tables["train"]} if task_args.split_fractions else tables


def _in_form(table: Dataset, task_args: TaskArguments, task_column: str) -> tuple[Dataset, RowForm]:
    """With the names that rows have here, and tasks made of what is not one yet; and what others like it need for that."""
    names = task_args.new_names()
    for old in names:
        if old not in table.column_names:
            raise MetaPeftError(
                f"rename_columns: there is no column {old!r}; the columns are {table.column_names}."
                f"{did_you_mean(old, table.column_names)}"
            )
    table = with_new_names(table, names)
    if task_args.self_supervised is not None:
        seed = task_args.split_seed
        made = self_supervised(
            table, task_args.self_supervised, task_column=task_column, mask=task_args.mask_word, seed=seed
        )
        return made, RowForm(names)
    languages = task_args.source_lang, task_args.target_lang
    if translation.COLUMN in table.column_names:
        return translation.as_pairs(table, *languages, task_column=task_column), RowForm(names, True, *languages)
    if any(languages):
        raise MetaPeftError(
            f"source_lang and target_lang are of rows with a column {translation.COLUMN!r}; the columns are"
            f" {table.column_names}."
        )
    return table, RowForm(names)
