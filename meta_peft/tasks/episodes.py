"""Episodes drawn from tasks: ``dataset[i]`` depends on the seed and on i alone.

So workers, ranks, a resumed run and a second run agree on every episode without any sampler state to keep. Only a rule
that chooses tasks by what training shows (`sampling.Adaptive`) depends on more, and keeps a state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.collate import row_length
from meta_peft.tasks.labelling import Labelling
from meta_peft.tasks.sampling import Rounds, TaskSampling
from meta_peft.tasks.support_selection import SupportSelection
from meta_peft.tasks.task_set import TaskSet
from meta_peft.types import Episode


class EpisodeDataset(Dataset[Episode]):
    """`length` episodes of `shots` support rows and `query_size` other rows each.

    Args:
        tasks: encoded tasks (see `TaskSet.encoded`).
        shots: support rows of an episode.
        query_size: query rows of an episode.
        length: how many episodes; by default one for each task.
        shuffle: visit the tasks in a new order each round; otherwise episode i is of task i, round after round.
        sampling: which task an episode is of, in place of rounds.
        selection: which of its rows are support, in place of random ones. The query rows are the same for every selection.
        labels: how classes are drawn and called, if episodes are of classes; then `shots` and `query_size` are of each.
    """

    def __init__(
        self,
        tasks: TaskSet,
        *,
        shots: int,
        query_size: int,
        seed: int = 0,
        length: int | None = None,
        shuffle: bool = True,
        sampling: TaskSampling | None = None,
        selection: SupportSelection | None = None,
        labels: Labelling | None = None,
    ):
        if shots < 1 or query_size < 1:
            raise MetaPeftError(f"shots and query_size must be 1 or more, got {shots} and {query_size}.")
        if labels is not None and selection is not None:
            raise MetaPeftError("Support rows of episodes of classes are random: leave support_selection or ways out.")
        if labels is not None and labels.words != "given" and tasks.encoding is None:
            raise MetaPeftError(f"label_words: {labels.words} are put into encoded rows: give tasks.encoded(...).")
        self.classes = None if labels is None else labels.classes(tasks)
        (self.classes or tasks).check_rows(shots, query_size)
        self.tasks, self.shots, self.query_size, self.seed = tasks, shots, query_size, seed
        self.length = len(tasks) if length is None else length
        self.sampling = sampling or Rounds(len(tasks), seed, shuffle)
        self.selection = selection

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Episode:
        if not 0 <= i < self.length:
            raise IndexError(i)
        task = self.tasks.names[self.sampling.task(i)]
        rng = np.random.default_rng([self.seed, 1, i])
        if self.classes is None:
            return Episode(task, *self._drawn(task, self.tasks.rows_of[task], rng))
        support, query = [], []
        for rows, label in self.classes.draw(task, self.shots + self.query_size, rng, self.tasks.encoding):
            drawn = self._drawn(task, rows, rng)
            if label is not None:
                drawn = [[self.tasks.encoding.with_label(row, label) for row in part] for part in drawn]
            support += drawn[0]
            query += drawn[1]
        return Episode(task, *([part[j] for j in rng.permutation(len(part))] for part in (support, query)))

    def _drawn(self, task: str, rows: np.ndarray, rng: np.random.Generator) -> list[list[dict[str, Any]]]:
        """Support rows and query rows of those with these numbers."""
        chosen = rng.choice(len(rows), self.shots + self.query_size, replace=False)
        support, query = chosen[: self.shots], chosen[self.shots :]
        if self.selection is not None:
            support = self.selection.choose(self.tasks, task, query, self.shots, rng)
        return [[self.tasks.dataset[int(rows[j])] for j in part] for part in (support, query)]

    def by_length(self) -> list[Episode]:
        """All episodes, shortest support rows first, so that those stacked together need little padding."""
        return sorted(self, key=lambda e: max(map(row_length, e.support)))
