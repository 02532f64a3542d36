"""Tasks by the direction of their meta-gradient: those unlike the mean of all tasks more often, or those like it.

Unlike ones keep an outer step from going over the same ground; like ones keep tasks out that pull elsewhere. Directions
are compared by sketches of `NUMBERS` numbers (see `gradient_sketch`), whose cosines are right to about
``1 / sqrt(NUMBERS)``. A task's own gradient is there only where each task is computed alone, which is what
`deterministic_reduction` does.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sampling.gradient_sketch import GradientSketch
from meta_peft.tasks.sampling.rule import Adaptive, Array, shared
from meta_peft.types import MetaGradient

NUMBERS = 256


class ByGradient(Adaptive):
    """The weight of a task is ``(1 - c) / 2``, or ``(1 + c) / 2`` if `similar`.

    c is the cosine of its newest meta-gradient with the mean of the directions of all tasks that were seen.
    """

    numbers = NUMBERS

    def __init__(self, n_tasks: int, tasks_per_step: int, seed: int, exploration: float, *, similar: bool):
        super().__init__(n_tasks, tasks_per_step, seed, exploration)
        self.similar = similar
        self.directions = np.zeros((n_tasks, NUMBERS), dtype=np.float32)
        self._sketch = GradientSketch(NUMBERS, seed)

    def note(self, gradient: MetaGradient) -> Tensor:
        if gradient.n_tasks != 1:
            raise MetaPeftError(
                f"A gradient of {gradient.n_tasks} tasks does not say what each of them gave: set"
                " deterministic_reduction."
            )
        return self._sketch(gradient.grads.adapter)[None]

    def learn(self, task: int, noted: Array) -> None:
        self.directions[task] = noted / max(float(np.linalg.norm(noted)), 1e-30)

    def weights(self) -> Array:
        if not self.seen.any():
            return np.zeros(self.n_tasks)
        mean = self.directions[self.seen].astype(float).mean(0)
        cosines = self.directions @ (mean / max(float(np.linalg.norm(mean)), 1e-30))
        return np.clip((1 + cosines if self.similar else 1 - cosines) / 2, 0, 1)

    def learned(self) -> dict[str, Tensor]:
        return {"directions": shared(self.directions)}
