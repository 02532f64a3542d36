"""Which algorithm an outer step runs, where that changes during training.

Multi-task training can come first. MAML may then follow MAML++ (Antoniou et al. 2019, arXiv 1810.09502, section 4): the
query losses after all inner steps count at first, with weights that go over to the last one (multi-step loss), and
inner gradients are constants at first (derivative-order annealing).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile

AnyAlgorithm: TypeAlias = MAML | ImplicitMAML | Reptile | MultiTask


@dataclass(frozen=True)
class Schedule:
    """
    Args:
        algorithm: what training ends with.
        multitask_until: outer step before which training is multi-task.
        multi_step_until: outer step at which only the query loss after the last inner step counts any more.
        first_order_until: outer step before which inner gradients are constants.
    """

    algorithm: AnyAlgorithm
    multitask_until: int = 0
    multi_step_until: int = 0
    first_order_until: int = 0

    def at(self, outer_step: int) -> AnyAlgorithm:
        """The algorithm of an outer step, counted from 0."""
        if outer_step < self.multitask_until:
            return MultiTask(self.algorithm.inner)
        if not isinstance(self.algorithm, MAML):
            return self.algorithm
        multi_step, first_order = self.algorithm.multi_step, self.algorithm.first_order
        if self.multi_step_until:
            multi_step = max(0.0, 1 - outer_step / self.multi_step_until)
        return replace(
            self.algorithm, multi_step=multi_step, first_order=first_order or outer_step < self.first_order_until
        )
