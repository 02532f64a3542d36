"""What a rule is: the task of an episode, as a function of the seed, the episode's number and, for some, a state.

Some rules learn from what training shows. Their state changes once an outer step, by numbers that all processes have
alike, so all of them go on to draw the same tasks, and it is kept in checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.types import MetaGradient

Array = np.ndarray


class TaskSampling(ABC):
    @abstractmethod
    def task(self, i: int) -> int:
        """The number of the task that episode `i` is of."""

    def begin(self, losses: Callable[[], Array]) -> None:  # noqa: B027  # most rules need nothing
        """A run starts. `losses` gives the loss of each task before any step ``[N]``, for those who need it."""

    def state(self) -> dict[str, Any]:
        """What a run that goes on later needs: numbers, texts and tensors."""
        return {"kind": type(self).__name__}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what `state` gave."""
        if state.get("kind") != type(self).__name__:
            raise MetaPeftError(
                f"The checkpoint's tasks were chosen by {state.get('kind')}, these options choose by"
                f" {type(self).__name__}: resume with the same task_sampling."
            )


class Adaptive(TaskSampling):
    """Draws tasks by weights that follow what training shows of them.

    In an outer step each task is drawn at most once, as long as there are enough. Tasks that were never drawn come
    first, in the order of a first round of `Rounds`. Afterwards a draw takes a share `exploration` of its chances evenly
    over all tasks, and the rest in proportion to `weights`.

    Only the tasks of the step that comes next can be told: later ones depend on what it shows.

    Args:
        n_tasks: N.
        tasks_per_step: T, the episodes of an outer step.
        exploration: from more than 0 to 1.
    """

    numbers: int
    """How many numbers `note` gives for a task."""

    def __init__(self, n_tasks: int, tasks_per_step: int, seed: int, exploration: float):
        self.n_tasks, self.tasks_per_step, self.seed, self.exploration = n_tasks, tasks_per_step, seed, exploration
        self._first_round = np.random.default_rng([seed, 0, 0]).permutation(n_tasks)
        self.step = 0
        self.seen = np.zeros(n_tasks, dtype=bool)
        self._drawn: Array | None = None

    @abstractmethod
    def note(self, gradient: MetaGradient) -> Tensor:
        """What is to be known of the tasks of a gradient, ``[n_tasks, numbers]``."""

    @abstractmethod
    def learn(self, task: int, noted: Array) -> None:
        """Take in ``[numbers]`` of a task, all of them finite."""

    @abstractmethod
    def weights(self) -> Array:
        """Of each task ``[N]``, 0 or more; what it is for a task not seen yet does not matter."""

    @abstractmethod
    def learned(self) -> dict[str, Tensor]:
        """What `learn` took in, as tensors that share the memory of what it changes."""

    def task(self, i: int) -> int:
        step, place = divmod(i, self.tasks_per_step)
        if step != self.step:
            raise MetaPeftError(
                f"Episode {i} is of outer step {step + 1}, and the tasks of step {self.step + 1} come next: this rule"
                " chooses them by what the steps before have shown."
            )
        return int(self.draw()[place])

    def draw(self) -> Array:
        """The tasks of the next outer step, ``[T]``."""
        if self._drawn is None:
            new = self._first_round[~self.seen[self._first_round]][: self.tasks_per_step]
            rest = self.tasks_per_step - len(new)
            chances, repeated = self._chances(), self.tasks_per_step > self.n_tasks
            if not repeated:
                chances = np.where(np.isin(np.arange(self.n_tasks), new), 0.0, chances)
            rng = np.random.default_rng([self.seed, 2, self.step])
            more = rng.choice(self.n_tasks, rest, replace=repeated, p=chances / chances.sum()) if rest else new[:0]
            self._drawn = np.concatenate([new, more])
        return self._drawn

    def _chances(self) -> Array:
        """Of each task ``[N]`` to be drawn first; they sum to 1."""
        weights = np.where(self.seen, self.weights(), 0.0)
        even = np.full(self.n_tasks, 1 / self.n_tasks)
        if not weights.sum() > 0:
            return even
        chances: Array = self.exploration * even + (1 - self.exploration) * weights / weights.sum()
        return chances

    def update(self, noted: Tensor) -> None:
        """The outer step is over. `noted` is what `note` gave for its tasks, ``[T, numbers]``, alike in all processes."""
        for task, numbers in zip(self.draw(), noted.detach().cpu().double().numpy(), strict=True):
            self.seen[task] = True
            if np.isfinite(numbers).all():
                self.learn(int(task), numbers)
        self.step, self._drawn = self.step + 1, None

    def begin(self, losses: Callable[[], Array]) -> None:
        for tensor in self._tensors().values():
            tensor.zero_()
        self.step, self._drawn = 0, None

    def state(self) -> dict[str, Any]:
        return {**super().state(), "step": self.step, **self._tensors()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for name, tensor in self._tensors().items():
            if name not in state or state[name].shape != tensor.shape:
                raise MetaPeftError(
                    f"The checkpoint chose among other tasks than these {self.n_tasks}: resume with the same tasks."
                )
            tensor.copy_(state[name])
        self.step, self._drawn = int(state["step"]), None

    def _tensors(self) -> dict[str, Tensor]:
        return {"seen": shared(self.seen), **self.learned()}


def shared(array: Array) -> Tensor:
    """A tensor of the same memory."""
    return torch.from_numpy(array)
