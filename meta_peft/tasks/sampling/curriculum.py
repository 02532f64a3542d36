"""From easy tasks to all of them (Platanios et al. 2019, arXiv 1903.09848).

Tasks are sorted by their loss before any step. At outer step s the share

``competence(s) = min(1, sqrt(s (1 - c0^2) / S + c0^2))``

of them, the easiest, may be drawn, all of these alike. That is the paper's square-root schedule, which lets new tasks
in at a rate that falls as there are more of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sampling.rule import Array, TaskSampling, shared

FIRST = 0.1  # c0, the share of tasks at the first step; never fewer than a step takes


class Curriculum(TaskSampling):
    """
    Args:
        n_tasks: N.
        tasks_per_step: T, the episodes of an outer step. None of its tasks is drawn twice, if there are enough.
        seed: of the draws.
        steps: S, the outer step from which all tasks may be drawn.
    """

    def __init__(self, n_tasks: int, tasks_per_step: int, seed: int, steps: int):
        self.n_tasks, self.tasks_per_step, self.seed, self.steps = n_tasks, tasks_per_step, seed, max(steps, 1)
        self.losses: Array | None = None
        self._drawn: tuple[int, Array] = (-1, np.zeros(0))

    def begin(self, losses: Callable[[], Array]) -> None:
        self._sort(losses())

    def task(self, i: int) -> int:
        step, place = divmod(i, self.tasks_per_step)
        if self._drawn[0] != step:
            self._drawn = step, self.draw(step)
        return int(self._drawn[1][place])

    def available(self, step: int) -> int:
        """How many tasks, the easiest first, may be drawn at outer step `step`, counted from 0."""
        competence = min(1.0, math.sqrt(step * (1 - FIRST**2) / self.steps + FIRST**2))
        return min(self.n_tasks, max(self.tasks_per_step, math.ceil(competence * self.n_tasks)))

    def draw(self, step: int) -> Array:
        """The tasks of outer step `step`, ``[T]``."""
        if self.losses is None:
            raise MetaPeftError("A curriculum sorts tasks by their losses: call begin() with them before it is used.")
        easiest = np.argsort(self.losses, kind="stable")[: self.available(step)]
        rng = np.random.default_rng([self.seed, 2, step])
        return rng.choice(easiest, self.tasks_per_step, replace=self.tasks_per_step > len(easiest))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "losses": None if self.losses is None else shared(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        losses = state["losses"]
        if losses is None or len(losses) != self.n_tasks:
            raise MetaPeftError(
                f"The checkpoint chose among other tasks than these {self.n_tasks}: resume with the same tasks."
            )
        self._sort(losses.numpy())

    def _sort(self, losses: Array) -> None:
        self.losses = np.nan_to_num(np.array(losses, dtype=float), nan=np.inf)
        self._drawn = (-1, np.zeros(0))
