"""The meta-gradient of an outer step, added up over batches and processes.

Every process adds its own tasks up and takes part in one reduction of one vector, ``[sum of gradients, sum of losses,
tasks, ...]``. Dividing by the tasks comes last, so it does not matter how they were spread, and a process without any
takes part like the others. In the same vector each says whether it failed or was asked to stop: nobody waits for one that
is not coming.

A sum over processes is rounded in another order than a sum over one process. With `in_order` each task's own gradient is
collected instead, and added up in the order of the tasks: the same bits for any number of processes, for more to send.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.params import flatten, unflatten
from meta_peft.processes import group
from meta_peft.types import Meta, MetaGradient, Params

COUNTS = 4  # numbers that follow the gradients in the vector


class ProcessFailedError(MetaPeftError):
    """Another process of the job failed, and this one ends with it."""


@dataclass(frozen=True)
class StepTotal:
    """What all processes have together.

    Args:
        gradient: the mean over all tasks; its `metrics` has their mean ``loss`` alone, ``[1]``.
        diverged: for how many tasks the inner loop diverged.
        stop: whether a process was asked to stop.
        notes: what was noted of each task, by its place in the step, ``[T, n]``; n is 0 if nothing was.
    """

    gradient: MetaGradient
    diverged: int
    stop: bool
    notes: Tensor


class StepSum:
    """
    Args:
        adapter: the LoRA matrices, for their names and shapes.
        hyper: the inner loop's rates. Their gradient is left out of a step in which no task gave one.
        in_order: whether to add up task by task, see above. Then every `add` has to be of a single task.
        notes: T and n, where n numbers are to be known of each of the T tasks of a step. They go through the same
            reduction, each task's in a place of its own, so that every process has them to the last bit.
    """

    def __init__(
        self,
        adapter: Mapping[str, Tensor],
        hyper: Mapping[str, Tensor],
        *,
        in_order: bool = False,
        notes: tuple[int, int] = (0, 0),
    ):
        self._adapter: Params = dict(adapter)
        self._hyper: Params = dict(hyper)
        self._in_order, self._notes = in_order, notes
        self._parts: list[tuple[int, Tensor]] = []  # place, [gradients, notes, loss, ...]
        self._error: BaseException | None = None

    def add(self, gradient: MetaGradient, first: int = 0, *, diverged: int = 0, noted: Tensor | None = None) -> None:
        """Add the mean gradient of some tasks, of which `first` is the place of the first one in the step.

        `noted` is what was noted of them, ``[n_tasks, n]``.
        """
        if self._in_order and gradient.n_tasks != 1:
            raise MetaPeftError(f"in_order adds up single tasks, got a gradient of {gradient.n_tasks}.")
        grads = {name: gradient.grads.adapter[name] for name in self._adapter}
        rates = {name: gradient.grads.hyper.get(name, torch.zeros_like(v)) for name, v in self._hyper.items()}
        own = flatten({**grads, **rates}).detach() * gradient.n_tasks
        loss = gradient.metrics["loss"].sum().to(own)
        counts = own.new_tensor([diverged, bool(gradient.grads.hyper), gradient.n_tasks])
        notes = own.new_zeros(self._notes)
        if noted is not None:
            notes[first : first + gradient.n_tasks] = noted.to(own)
        part = torch.cat([own, notes.flatten(), loss[None], counts])
        if self._in_order or not self._parts:
            self._parts.append((first, part))
        else:
            self._parts[0][1].add_(part)

    def fail(self, error: BaseException | None) -> None:
        """This process cannot compute its part: `total` raises the error here, and stops the others. None is no error."""
        self._error = self._error or error

    def total(self, *, stop: bool = False) -> StepTotal:
        """The mean over everything that was added anywhere since the last call. Every process has to call it.

        Args:
            stop: whether this process was asked to stop.

        Raises:
            ProcessFailedError: another process failed. The one that did raises its own error.
        """
        said = torch.tensor([stop, self._error is not None], dtype=torch.float32)
        vector, said = self._ordered(said) if self._in_order else self._summed(said)
        self._parts = []
        if said[1]:
            self._raise()
        loss, diverged, gives_rates, n_tasks = vector[-COUNTS:]
        if not n_tasks:
            raise MetaPeftError("An outer step had no task in any process.")
        noted = vector[-COUNTS - math.prod(self._notes) : -COUNTS]
        sums = vector[: len(vector) - COUNTS - len(noted)]
        mean = unflatten(sums / n_tasks, {**self._adapter, **self._hyper})
        grads = Meta({n: mean[n] for n in self._adapter}, {n: mean[n] for n in self._hyper} if gives_rates else {})
        return StepTotal(
            MetaGradient(grads, int(n_tasks), {"loss": (loss / n_tasks)[None]}),
            int(diverged),
            bool(said[0]),
            noted.view(self._notes),
        )

    def _summed(self, said: Tensor) -> tuple[Tensor, Tensor]:
        own = self._parts[0][1] if self._parts else self._nothing()
        total = group.summed(torch.cat([own, said.to(own)]))
        return total[: -len(said)], total[-len(said) :]

    def _ordered(self, said: Tensor) -> tuple[Tensor, Tensor]:
        nothing = self._nothing()
        counts = group.gathered(torch.cat([nothing.new_tensor([len(self._parts)]), said.to(nothing)]))
        most, said = int(max(c[0] for c in counts)), torch.stack(counts)[:, 1:].sum(0)
        # Each row has its place in the step before it; rows that only fill up have the place -1.
        rows = nothing.new_zeros(most, 1 + len(nothing))
        rows[:, 0] = -1
        for row, (place, part) in zip(rows, self._parts, strict=False):
            row[0], row[1:] = place, part
        placed = [row for rows in group.gathered(rows) for row in rows if row[0] >= 0]
        total = nothing
        for row in sorted(placed, key=lambda row: float(row[0])):
            total = total + row[1:]
        return total, said

    def _nothing(self) -> Tensor:
        values = [*self._adapter.values(), *self._hyper.values()]
        size = sum(v.numel() for v in values)
        dtype = values[0].dtype
        for value in values:
            dtype = torch.promote_types(dtype, value.dtype)
        return torch.zeros(size + math.prod(self._notes) + COUNTS, dtype=dtype, device=values[0].device)

    def _raise(self) -> None:
        error, self._error = self._error, None
        failures = group.gathered_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        told = "; ".join(f"process {i}: {f}" for i, f in enumerate(failures) if f is not None)
        raise ProcessFailedError(f"This process stops because another one failed: {told}")
