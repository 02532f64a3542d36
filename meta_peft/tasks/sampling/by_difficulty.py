"""Tasks that are still hard more often: in proportion to their recent loss after adaptation."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from meta_peft.tasks.sampling.rule import Adaptive, Array, shared
from meta_peft.types import MetaGradient

NEWEST = 0.5  # weight of a task's newest loss in its running mean: tasks are seen seldom, and change between


class ByDifficulty(Adaptive):
    """The weight of a task is the running mean of the losses that the algorithm reports for it.

    For MAML that is the query loss after the inner steps. A loss that is not finite is left out.
    """

    numbers = 1

    def __init__(self, n_tasks: int, tasks_per_step: int, seed: int, exploration: float):
        super().__init__(n_tasks, tasks_per_step, seed, exploration)
        self.losses = np.full(n_tasks, 0.0)
        self.counts = np.zeros(n_tasks)

    def note(self, gradient: MetaGradient) -> Tensor:
        return gradient.metrics["loss"].detach()[:, None]

    def learn(self, task: int, noted: Array) -> None:
        newest = NEWEST if self.counts[task] else 1.0
        self.losses[task] += newest * (float(noted[0]) - self.losses[task])
        self.counts[task] += 1

    def weights(self) -> Array:
        return np.maximum(self.losses, 0.0)

    def learned(self) -> dict[str, Tensor]:
        return {"losses": shared(self.losses), "counts": shared(self.counts)}
