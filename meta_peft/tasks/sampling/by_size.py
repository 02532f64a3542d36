"""Large tasks more often: ``p(task) ~ rows(task) ** (1 / temperature)``.

A temperature of 1 draws tasks as often as their rows are, a high one all alike (the sampling of multilingual BERT and
T5). Draws are independent of one another, so one outer step may have a task twice, with other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meta_peft.tasks.sampling.rule import TaskSampling


class BySize(TaskSampling):
    """
    Args:
        sizes: rows of each task.
        seed: of the draws.
        temperature: more than 0.
    """

    def __init__(self, sizes: Sequence[int], seed: int, temperature: float):
        logs = np.log(np.asarray(sizes, dtype=float)) / temperature
        weights = np.exp(logs - logs.max())  # a low temperature would overflow
        self.chances = weights / weights.sum()
        self.seed = seed
        self._up_to = np.cumsum(self.chances)

    def task(self, i: int) -> int:
        drawn = np.random.default_rng([self.seed, 0, i]).random() * self._up_to[-1]
        return int(np.searchsorted(self._up_to, drawn, side="right"))
