"""The values that flow between the parts of meta_peft, and how they are split and ordered. Nothing else is computed.

Shape letters used everywhere: T tasks, R rows of one task, B = T * R rows of a stack (task-major: all rows of
task 0, then all of task 1, ...), L tokens of a row, N labelled positions of a stack, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Tensors by name. LoRA matrices are ``[out, in]`` for one task or shared by all, ``[T, out, in]`` for a stack."""


@dataclass(frozen=True)
class Episode:
    """One draw of one task: rows to adapt on and other rows to be judged by."""

    task: str
    support: list[dict[str, Any]]
    query: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of T tasks as one stack of model inputs.

    `inputs` holds what the model is called with, rows first: tokens ``[B, L]``, for instance, or sound
    ``[B, mel, frames]``; `labels_BL` the tokens or the classes to predict, -100 where nothing is to be predicted, with a
    length of its own where the model reads one thing and answers another. Where each row has answers to choose from,
    `choices_BCL` holds their token ids, -100 behind their ends. Two `Rows` are equal only if they are the same object:
    caches rely on that.
    """

    inputs: dict[str, Tensor]
    labels_BL: Tensor
    n_tasks: int
    choices_BCL: Tensor | None = None

    def to(self, device: Any) -> Rows:
        return self._each(lambda tensor: tensor.to(device), self.n_tasks)

    @property
    def positions_per_task(self) -> int:
        """How many positions of its longest input a model has to compute for one task."""
        longest = max(tensor.shape[-1] for tensor in (*self.inputs.values(), self.labels_BL))
        return longest * self.labels_BL.shape[0] // self.n_tasks

    def in_order(self, order: Tensor) -> Rows:
        """The rows of the same tasks in another order, ``[T]``."""
        per_task = self.labels_BL.shape[0] // self.n_tasks
        index_B = (order[:, None] * per_task + torch.arange(per_task)).flatten().to(self.labels_BL.device)
        return self._each(lambda tensor: tensor[index_B], self.n_tasks)

    def tasks(self, start: int, stop: int) -> Rows:
        """The rows of tasks `start` to `stop` alone."""
        per_task = self.labels_BL.shape[0] // self.n_tasks
        return self._each(lambda tensor: tensor[start * per_task : stop * per_task], stop - start)

    def _each(self, change: Callable[[Tensor], Tensor], n_tasks: int) -> Rows:
        choices = None if self.choices_BCL is None else change(self.choices_BCL)
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        return Rows(inputs, change(self.labels_BL), n_tasks, choices)


class Stack(NamedTuple):
    """How many layers a model has; how many lie below the first adapted one, and from there below the first fast one."""

    all: int
    frozen: int
    slow: int = 0


@dataclass(frozen=True, eq=False)
class EpisodeBatch:
    """T episodes: their support rows, their query rows and the names of their tasks."""

    support: Rows
    query: Rows
    tasks: list[str]

    @property
    def n_tasks(self) -> int:
        return self.support.n_tasks

    def to(self, device: Any) -> EpisodeBatch:
        return EpisodeBatch(self.support.to(device), self.query.to(device), self.tasks)

    def by_length(self) -> tuple[EpisodeBatch, Tensor]:
        """The same episodes from short rows to long ones, so that parts need little padding; and their order, ``[T]``."""
        ends = [_last_label(rows) for rows in (self.support, self.query)]
        order = torch.stack(ends).amax(0).argsort(stable=True).cpu()
        batch = EpisodeBatch(self.support.in_order(order), self.query.in_order(order), [self.tasks[t] for t in order])
        return batch, order

    def part(self, start: int, stop: int) -> EpisodeBatch:
        """The episodes `start` to `stop` alone."""
        if (start, stop) == (0, self.n_tasks):
            return self
        return EpisodeBatch(self.support.tasks(start, stop), self.query.tasks(start, stop), self.tasks[start:stop])


def _last_label(rows: Rows) -> Tensor:
    """The last labelled position of each task's rows, ``[T]``."""
    position_L = torch.arange(rows.labels_BL.shape[1], device=rows.labels_BL.device)
    return ((rows.labels_BL >= 0) * position_L).amax(1).view(rows.n_tasks, -1).amax(1)


@dataclass(frozen=True)
class Meta:
    """What the outer loop learns: the adapter's initialisation and the inner loop's rates.

    `given` is what losses depend on besides, under names of its own: no inner step moves it (see `slow_prefix`).
    """

    adapter: Params
    hyper: Params
    given: Params = field(default_factory=dict)


@dataclass(frozen=True)
class MetaGradient:
    """The gradient of the mean objective over `n_tasks` tasks, and what was seen on the way.

    `metrics` holds one value per task, ``[T]`` each, or several, ``[T, n]``. Every algorithm reports ``loss``, the loss it
    descends; those with an inner loop report `SUPPORT_LOSSES`, before each of its K steps, ``[T, K]``. `of_adapter` is the
    name of the adapter of a model, which the names in `grads` leave out; None where there is no model, or several made it.
    """

    grads: Meta
    n_tasks: int
    metrics: Params = field(default_factory=dict)
    of_adapter: str | None = None

    def without(self, names: Collection[str]) -> MetaGradient:
        """The same, of a model in which the weights called `names` start where they are."""
        adapter = {name: grad for name, grad in self.grads.adapter.items() if name not in names}
        return replace(self, grads=replace(self.grads, adapter=adapter))


SUPPORT_LOSSES = "support_losses"

LossFn: TypeAlias = Callable[[Params, Rows], Tensor]
"""``(adapter, rows) -> loss_T``: one loss per task, each the mean over that task's own labelled positions."""

Algorithm: TypeAlias = Callable[[LossFn, Meta, EpisodeBatch], MetaGradient]
"""An estimator of the meta-gradient. It knows nothing of models, PEFT or Accelerate."""
