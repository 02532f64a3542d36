"""One outer step of a process: its tasks' meta-gradients, the sum over all processes, and what was wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.outer_loop.health import diverged, is_finite, what_is_not_finite
from meta_peft.outer_loop.memory_plan import MemoryPlan
from meta_peft.outer_loop.outer_loop import LearnedRates, meta_gradient
from meta_peft.outer_loop.schedule import AnyAlgorithm
from meta_peft.processes import Share, StepSum, StepTotal
from meta_peft.processes.group import gathered_objects
from meta_peft.tasks.sampling import Adaptive
from meta_peft.types import SUPPORT_LOSSES, EpisodeBatch, Meta

logger = logging.getLogger("meta_peft")


class OuterStep:
    """Adds shares up, then gives the total; used again for every outer step.

    Args:
        loss_fn: the bound model.
        rates: the inner loop's rates.
        plan: how many tasks go through the model at once.
        in_order: see `StepSum`.
        in_lockstep: whether all processes have to run the same forwards, as they do on a sharded base. Then no process
            can wait for the end of the step with an error, nor look at its own tasks once more.
        device: where batches are computed.
        sampling: a rule for choosing tasks that is told of each step what it noted; None for those that learn nothing.
        fixed: names of weights that no outer step moves, so that tasks are not chosen by their gradients.
    """

    def __init__(
        self,
        loss_fn: AdapterLoss,
        rates: LearnedRates,
        plan: MemoryPlan,
        *,
        in_order: bool,
        in_lockstep: bool,
        device: Any,
        sampling: Adaptive | None = None,
        fixed: Collection[str] = (),
    ):
        self.loss_fn, self.rates, self.plan, self.device = loss_fn, rates, plan, device
        self._in_lockstep, self._sampling, self._fixed = in_lockstep, sampling, fixed
        learned = rates.values() if rates.log_rates.requires_grad else {}
        notes = (0, 0) if sampling is None else (sampling.tasks_per_step, sampling.numbers)
        self._sum = StepSum(loss_fn.weights.parameters(), learned, in_order=in_order, notes=notes)
        self._bad: list[tuple[EpisodeBatch, AnyAlgorithm]] = []
        self._named: set[str] = set()
        self.losses_before: list[float] = []
        """Support losses before the first inner step, of each task of this process, until somebody clears them."""

    def add(self, share: Share, algorithm: AnyAlgorithm) -> None:
        """Compute a share. An error waits for `total`, where the other processes learn of it."""
        try:
            if share.error is not None:
                raise share.error
            first = share.first
            for batch in share.batches:
                batch = batch.to(self.device)
                gradient = meta_gradient(self.loss_fn, batch, algorithm, self.rates, tasks_per_forward=self.plan)
                uphill = diverged(gradient, batch.tasks)
                noted = None if self._sampling is None else self._sampling.note(gradient.without(self._fixed))
                self._sum.add(gradient, first, diverged=len(uphill), noted=noted)
                self._say_once(uphill)
                if SUPPORT_LOSSES in gradient.metrics:
                    self.losses_before += gradient.metrics[SUPPORT_LOSSES][:, 0].tolist()
                if not is_finite(gradient):
                    self._bad.append((batch, algorithm))
                first += batch.n_tasks
        except Exception as error:
            if self._in_lockstep:
                raise
            self._sum.fail(error)

    def total(self, *, stop: bool = False) -> tuple[StepTotal, list[str]]:
        """The total over all processes, and in words what in it is not finite; nothing of that, if all is well."""
        try:
            total = self._sum.total(stop=stop)
            if self._sampling is not None:
                self._sampling.update(total.notes)
            if is_finite(total.gradient):
                return total, []
            found = gathered_objects(
                [reason for batch, algorithm in self._bad for reason in self._reasons(batch, algorithm)]
            )
            reasons = [reason for of_process in found for reason in of_process]
            return total, reasons or ["the sum over all tasks, each of which is finite"]
        finally:
            self._bad = []

    def _reasons(self, batch: EpisodeBatch, algorithm: AnyAlgorithm) -> list[str]:
        """Each task by itself, to see which it is.

        The other processes wait for these words, so what goes wrong in finding them is part of them.
        """
        if self._in_lockstep:
            return [f"one of the tasks {', '.join(map(repr, batch.tasks))}"]
        weights = {name: p.detach() for name, p in self.loss_fn.weights.parameters().items()}
        found = []
        for task in range(batch.n_tasks):
            alone = batch.part(task, task + 1)
            try:
                gradient = meta_gradient(self.loss_fn, alone, algorithm, self.rates, tasks_per_forward=1)
                if not is_finite(gradient):
                    meta = Meta(weights, self.rates.values())
                    found.append(what_is_not_finite(self.loss_fn, meta, algorithm.inner, alone, gradient))
            except Exception as error:
                found.append(f"perhaps task {batch.tasks[task]!r}, which could not be looked at by itself ({error!r})")
        return found

    def _say_once(self, uphill: list[str]) -> None:
        new = sorted(set(uphill) - self._named)
        if new:
            self._named.update(new)
            logger.warning(
                "The inner loop goes uphill on %s: the support loss grows from step to step. A smaller inner_lr, or"
                " inner_max_grad_norm, keeps it down.",
                ", ".join(map(repr, new)),
            )
