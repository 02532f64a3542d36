"""Which rows of a task are its support rows: random ones, or rows that are chosen.

- ``balanced``: as evenly over the answers as they go, random within an answer.
- ``diverse``: the row in the middle, then always the row that is farthest from those chosen (greedy k-center, Gonzalez
  1985; core-sets, Sener and Savarese 2018, arXiv 1708.00489), by the base model's own representation of the prompt.
- ``uncertain``: those that the base model on its own is worst at. For rows with answers that is their loss; for prompts
  alone, the entropy of the base's next token after the prompt.

What the base says of a row does not change in training, so it is computed once for each task. Where a task is large,
only `LARGEST` of its rows are looked at, the same ones in every episode.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.task_set import TaskSet
from meta_peft.utils.checked import one_of

SELECTIONS = ("random", "balanced", "diverse", "uncertain")
NEED_THE_BASE = ("diverse", "uncertain")
LARGEST = 512

Array = np.ndarray
EncodedRow = dict[str, Any]


class View(Protocol):
    """What a base model says of encoded rows (see `base_view`)."""

    def vectors(self, rows: Sequence[EncodedRow]) -> Array:
        """``[n, H]``"""

    def uncertainty(self, rows: Sequence[EncodedRow]) -> Array:
        """``[n]``"""


class SupportSelection:
    """The choice for the episodes of an `EpisodeDataset`.

    Args:
        how: balanced, diverse or uncertain. Random support is what an `EpisodeDataset` takes without a selection.
        view: the base model, for diverse and uncertain.
        seed: of the rows that are looked at in a large task.
    """

    def __init__(self, how: str, view: View | None = None, seed: int = 0):
        check_selection(how)
        if how == "random":
            raise MetaPeftError("Random support needs no SupportSelection: leave selection out.")
        if how in NEED_THE_BASE and view is None:
            raise MetaPeftError(f"The selection {how!r} asks the base model: give a view of it.")
        self.how, self._view, self._seed = how, view, seed
        self._known: dict[str, tuple[Array, Array]] = {}

    def choose(self, tasks: TaskSet, task: str, taken: Array, shots: int, rng: np.random.Generator) -> Array:
        """The positions ``[shots]`` of the chosen rows within the task.

        Args:
            tasks: encoded tasks; the same ones at every call, since what is known of a task is kept by its name.
            taken: positions that cannot be chosen: those of the query rows.
        """
        if task not in self._known:
            rows_of = tasks.rows_of[task]
            looked_at = self._looked_at(task, len(rows_of), 4 * (shots + len(taken)))
            rows = [tasks.dataset[int(rows_of[int(position)])] for position in looked_at]
            self._known[task] = looked_at, features(self.how, rows, self._view)
        looked_at, known = self._known[task]
        free = np.flatnonzero(~np.isin(looked_at, taken))
        found: Array = looked_at[free[chosen(self.how, known[free], shots, rng)]]
        return found

    def _looked_at(self, task: str, n_rows: int, least: int) -> Array:
        most = max(LARGEST, least)
        if n_rows <= most:
            return np.arange(n_rows)
        rng = np.random.default_rng([self._seed, 4, crc32(task.encode("utf-8", "surrogatepass"))])
        return np.sort(rng.choice(n_rows, most, replace=False))


def check_selection(how: str) -> None:
    """Raise unless there is such a selection."""
    one_of("support_selection", how, SELECTIONS)


def features(how: str, rows: Sequence[EncodedRow], view: View | None) -> Array:
    """What `how` chooses by, one for each row, ``[n]`` or ``[n, H]``."""
    if how == "balanced":
        number: dict[Hashable, int] = {}
        return np.array([number.setdefault(answer(row), len(number)) for row in rows])
    assert view is not None
    return view.vectors(rows) if how == "diverse" else view.uncertainty(rows)


def chosen(how: str, known: Array, shots: int, rng: np.random.Generator) -> Array:
    """Positions ``[shots]`` among the rows that `known` says something of, one each."""
    rules: dict[str, Callable[[], Array]] = {
        "random": lambda: rng.permutation(len(known))[:shots],
        "balanced": lambda: balanced(known.tolist(), shots, rng),
        "diverse": lambda: k_center(known, shots),
        "uncertain": lambda: most_uncertain(known, shots),
    }
    return rules[how]()


def answer(row: EncodedRow) -> Hashable:
    """What a row's labels say, for rows of one answer to be known as such."""
    labels = row["labels"]
    return tuple(token for token in labels if token != IGNORED) if isinstance(labels, list) else labels


def balanced(answers: Sequence[Hashable], shots: int, rng: np.random.Generator) -> Array:
    """Rows in a random order, one of each answer in turn, until there are enough."""
    waiting: dict[Hashable, list[int]] = {}
    for position in rng.permutation(len(answers)):
        waiting.setdefault(answers[position], []).append(int(position))
    in_turn = sorted(
        ((turn, place), position)
        for place, positions in enumerate(waiting.values())
        for turn, position in enumerate(positions)
    )
    return np.array([position for _, position in in_turn[:shots]])


def k_center(vectors: Array, shots: int) -> Array:
    """The row nearest to the mean of ``[n, H]``, then always the one farthest from those there are; the first of equals."""
    vectors = vectors.astype(float)
    first = int(((vectors - vectors.mean(0)) ** 2).sum(1).argmin())
    found, nearest = [first], ((vectors - vectors[first]) ** 2).sum(1)
    while len(found) < shots:
        nearest[found] = -1.0  # never twice, also where rows are alike
        farthest = int(nearest.argmax())
        found.append(farthest)
        nearest = np.minimum(nearest, ((vectors - vectors[farthest]) ** 2).sum(1))
    return np.array(found)


def most_uncertain(scores: Array, shots: int) -> Array:
    """The largest of ``[n]``, the first of equals."""
    return np.argsort(-np.nan_to_num(scores.astype(float), nan=np.inf), kind="stable")[:shots]
