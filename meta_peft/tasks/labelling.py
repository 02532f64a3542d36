"""Episodes of classes: N ways, K shots of each, and what the classes are called in an episode.

Where the task column is the column of labels, a task is a class: episode i is of one class, which the order of tasks
decides, and of N - 1 others. So a split by task is a split by class. With another task column, the classes are those of
one task.

Label words that mean something can be guessed without a single example. Permuted among the classes of an episode, or
replaced by letters, they give nothing away, so that examples have to be learned from.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoding.facts import IDS, NUMBERS
from meta_peft.tasks.prompt import INPUT_TARGET, example_columns
from meta_peft.tasks.row_index import LEAVE_OUT
from meta_peft.tasks.task_set import TaskSet
from meta_peft.tasks.written import written
from meta_peft.utils.checked import is_whole, one_of

GIVEN = "given"
LABEL_WORDS = (GIVEN, "permuted", "letters")
HEADS = ("sequence_classification",)  # objectives whose answers are class numbers


def of_classes(ways: int | None) -> str:
    """What to say behind a number of shots or of query rows: of episodes of classes they are numbers for each class."""
    return "" if ways is None else f" of each of {ways} classes"


@dataclass(frozen=True)
class Labelling:
    """How the classes of an episode are drawn and called.

    Args:
        ways: classes of an episode.
        words: what they are called: ``given``, as in the data; ``permuted``, each by the word of one of them; ``letters``,
            A, B, C and so on at random.
        column: the column of labels.

    With a head in place of words, classes are numbers. If `given`, a class has the same number in all episodes of a task,
    however many of its classes are drawn, and it is the one that `adapt` gives it: itself, if it is a number; else the
    place of its name among all names, or among those of its task (see `Encoding.naming`). Where each task is a class,
    and the head has no room for all names, they are numbered from 0 in each episode in the order of their names, as
    `adapt` does with those of its rows. With other words, classes are numbered from 0 in any order.
    """

    ways: int
    words: str = GIVEN
    column: str = "label"

    def __post_init__(self) -> None:
        if not (is_whole(self.ways) and self.ways >= 2):
            raise MetaPeftError(f"ways must be a whole number of 2 or more; got {self.ways!r}.")
        one_of("label_words", self.words, LABEL_WORDS)
        if self.words == "letters" and self.ways > len(string.ascii_uppercase):
            raise MetaPeftError(f"There are {len(string.ascii_uppercase)} letters for ways={self.ways}: permute words.")

    def tasks_are_classes(self, task_columns: tuple[str, ...]) -> bool:
        """Whether each task is a class, where these columns name the tasks."""
        return task_columns == (self.column,)

    def labelled(self, tasks: TaskSet) -> TaskSet:
        """The tasks without rows that have no label: they are of no class.

        Raises:
            MetaPeftError: there are some, and they are not to be left out.
        """
        self._check_column(tasks)
        return tasks.having(self.column)

    def classes(self, tasks: TaskSet) -> Classes:
        """The classes of `tasks`."""
        self._check_column(tasks)
        form = example_columns(tasks.table.column_names)
        if self.words != GIVEN and (form not in INPUT_TARGET or form[1] != self.column):
            raise MetaPeftError(
                f"label_words: {self.words} puts other words in the place of the answer, so rows must be text + label, and"
                f" label_column the label; they are {' + '.join(form)}, and label_column is {self.column}."
            )
        kind = getattr(tasks.table.features[self.column], "dtype", "")
        numbers = kind.startswith(("int", "uint", "float"))
        if self.tasks_are_classes(tasks.task_columns):
            return Classes(self, dict(tasks.rows_of), within={}, numbers=numbers)
        return Classes(self, {}, within=_by_label(tasks, self.column), numbers=numbers)

    def _check_column(self, tasks: TaskSet) -> None:
        if self.column not in tasks.table.column_names:
            raise MetaPeftError(
                f"Expected a column {self.column!r} with the label of each row; the columns are"
                f" {tasks.table.column_names}. Name the right one with label_column."
            )


@dataclass(frozen=True)
class Classes:
    """Row numbers by class: of all tasks together (`everywhere`), or by task (`within`).

    `numbers` says that labels are numbers, whose order is not that of their digits, and which a head takes as they are.
    """

    labelling: Labelling
    everywhere: Mapping[str, np.ndarray]
    within: Mapping[str, Mapping[str, np.ndarray]]
    numbers: bool = False

    def enough(self, shots: int, query_size: int) -> list[str]:
        """The tasks that an episode can be drawn of."""
        least, ways = shots + query_size, self.labelling.ways
        if self.everywhere:
            return [label for label, rows in self.everywhere.items() if len(rows) >= least]
        return [t for t, classes in self.within.items() if sum(len(rows) >= least for rows in classes.values()) >= ways]

    def check_rows(self, shots: int, query_size: int) -> None:
        """Raise unless an episode can be drawn of every task."""
        ways, least = self.labelling.ways, shots + query_size
        if self.everywhere and len(self.everywhere) < ways:
            raise MetaPeftError(
                f"There are {len(self.everywhere)} classes, but an episode takes ways={ways}. Lower ways, or give more"
                " classes to each split."
            )
        enough = set(self.enough(shots, query_size))
        for label, rows in self.everywhere.items():
            if label not in enough:
                raise MetaPeftError(
                    f"Class {label!r} has {len(rows)} distinct rows, but an episode takes {shots} support rows and"
                    f" {query_size} query rows of each class. Lower shots or query_size, or leave the class out"
                    " (small_tasks: leave_out)."
                )
        for task, classes in self.within.items():
            if task not in enough:
                able = sum(len(rows) >= least for rows in classes.values())
                raise MetaPeftError(
                    f"Task {task!r} has {able} classes with {least} distinct rows or more (of {len(classes)} in all), but"
                    f" an episode takes ways={ways} classes with {shots} support rows and {query_size} query rows each."
                    " Lower one of these, or leave the task out (small_tasks: leave_out)."
                )

    def query_size(self, shots: int, most: int | None = None) -> int:
        """Query rows of a class that every episode can have: `most`, or what the smallest class has left."""
        if self.everywhere:
            fewest = min(len(rows) for rows in self.everywhere.values())
        else:
            sizes = [sorted((len(rows) for rows in c.values()), reverse=True) for c in self.within.values()]
            fewest = min(s[self.labelling.ways - 1] if len(s) >= self.labelling.ways else 0 for s in sizes)
        left = max(1, fewest - shots)
        return left if most is None else min(most, left)

    def draw(
        self, task: str, rows_each: int, rng: np.random.Generator, encoding: Any
    ) -> list[tuple[np.ndarray, str | int | None]]:
        """The classes of an episode, in any order: their rows, and the label that these get; None is their own."""
        labelling = self.labelling
        if self.everywhere:
            others = [label for label in self.everywhere if label != task]
            chosen = [task, *(others[i] for i in rng.choice(len(others), labelling.ways - 1, replace=False))]
            rows = self.everywhere
        else:
            rows = self.within[task]
            able = [label for label in rows if len(rows[label]) >= rows_each]
            chosen = [able[i] for i in rng.choice(len(able), labelling.ways, replace=False)]
        if labelling.words == GIVEN:
            chosen = sorted(chosen, key=float if self.numbers else str)
        else:
            chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        if getattr(encoding, "objective", None) in HEADS:
            labels: list[Any] = [None] * len(chosen) if self._have_numbers(encoding) else list(range(len(chosen)))
        elif labelling.words == "letters":
            labels = list(string.ascii_uppercase[: len(chosen)])
        elif labelling.words == "permuted":
            labels = [chosen[i] for i in rng.permutation(len(chosen))]
        else:
            labels = [None] * len(chosen)
        return [(rows[label], called) for label, called in zip(chosen, labels, strict=True)]

    def _have_numbers(self, encoding: Any) -> bool:
        """Whether classes keep the numbers that their rows were encoded with, which are those that `adapt` gives them.

        A task that is a class, and has no number among all names, has none: it is the only one of its task.
        """
        facts = encoding.facts
        by_itself = facts.labels == NUMBERS or (self.numbers and facts.labels != IDS)
        return self.labelling.words == GIVEN and bool(self.within or by_itself or facts.label_names)


def episodes_of(tasks: TaskSet, labels: Labelling | None) -> TaskSet | Classes:
    """What episodes are drawn of: tasks, or with `labels` classes. Both say which are large enough for an episode."""
    return tasks if labels is None else labels.classes(tasks)


def large_enough(
    tasks: TaskSet, labels: Labelling | None, shots: int, query_size: int, small_tasks: str = "error"
) -> TaskSet:
    """The tasks, of all of which an episode can be drawn; with `labels`, without rows that have none.

    Raises:
        MetaPeftError: one is too small, and ``small_tasks="leave_out"`` does not leave it out; or rows have no label.
    """
    if labels is not None:
        tasks = labels.labelled(tasks)
    if small_tasks == LEAVE_OUT:
        tasks = tasks.only(episodes_of(tasks, labels).enough(shots, query_size))
    episodes_of(tasks, labels).check_rows(shots, query_size)
    return tasks


def numbered_within(tasks: TaskSet) -> TaskSet:
    """The same tasks with the labels of each numbered from 0 in their own order: the same name is nothing in common."""
    tasks = tasks.select(tasks.names)
    column = example_columns(tasks.dataset.column_names)[-1]
    labels = list(tasks.dataset[column])
    numbers = np.zeros(len(labels), np.int64)
    for rows in tasks.rows_of.values():
        own = {label: number for number, label in enumerate(sorted({labels[row] for row in rows}))}
        numbers[rows] = [own[labels[row]] for row in rows]
    return TaskSet(tasks.dataset.remove_columns(column).add_column(column, numbers), tasks.task_columns)


def _by_label(tasks: TaskSet, column: str) -> dict[str, dict[str, np.ndarray]]:
    code_of: dict[Any, int] = {}
    parts = []
    for table in tasks.table.select_columns([column]).with_format("arrow").iter(10_000):
        parts.append(np.array([code_of.setdefault(value, len(code_of)) for value in table[column].to_pylist()]))
    codes, labels = np.concatenate(parts), [written(value) for value in code_of]
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, rows in tasks.rows_with(column).items():
        own = codes[rows]
        found[task] = {labels[code]: rows[own == code] for code in np.unique(own)}
    return found
