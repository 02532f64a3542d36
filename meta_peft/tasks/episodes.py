"""Episodes drawn from tasks: ``dataset[i]`` depends on the seed and on i alone.

So workers, ranks, a resumed run and a second run agree on every episode without any sampler state to keep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.labelling import Labelling
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
        labels: Labelling | None = None,
    ):
        if shots < 1 or query_size < 1:
            raise MetaPeftError(f"shots and query_size must be 1 or more, got {shots} and {query_size}.")
        if labels is not None and labels.words != "given" and tasks.encoding is None:
            raise MetaPeftError(f"label_words: {labels.words} are put into encoded rows: give tasks.encoded(...).")
        self.classes = None if labels is None else labels.classes(tasks)
        (self.classes or tasks).check_rows(shots, query_size)
        self.tasks, self.shots, self.query_size, self.seed = tasks, shots, query_size, seed
        self.length = len(tasks) if length is None else length
        self.shuffle = shuffle

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Episode:
        if not 0 <= i < self.length:
            raise IndexError(i)
        task = self.tasks.names[self._task_number(i)]
        rng = np.random.default_rng([self.seed, 1, i])
        if self.classes is None:
            return Episode(task, *self._drawn(self.tasks.rows_of[task], rng))
        support, query = [], []
        for rows, label in self.classes.draw(task, self.shots + self.query_size, rng, self.tasks.encoding):
            drawn = self._drawn(rows, rng)
            if label is not None:
                drawn = [[self.tasks.encoding.with_label(row, label) for row in part] for part in drawn]
            support += drawn[0]
            query += drawn[1]
        return Episode(task, *([part[j] for j in rng.permutation(len(part))] for part in (support, query)))

    def _drawn(self, rows: np.ndarray, rng: np.random.Generator) -> list[list[dict[str, Any]]]:
        """Support rows and query rows of those with these numbers."""
        chosen = rng.choice(len(rows), self.shots + self.query_size, replace=False)
        drawn = [self.tasks.dataset[int(rows[j])] for j in chosen]
        return [drawn[: self.shots], drawn[self.shots :]]

    def by_length(self) -> list[Episode]:
        """All episodes, shortest support rows first, so that those stacked together need little padding."""
        return sorted(
            (self[i] for i in range(len(self))), key=lambda e: max(len(row["input_ids"]) for row in e.support)
        )

    def _task_number(self, i: int) -> int:
        round_, place = divmod(i, len(self.tasks))
        if not self.shuffle:
            return place
        return int(np.random.default_rng([self.seed, 0, round_]).permutation(len(self.tasks))[place])
