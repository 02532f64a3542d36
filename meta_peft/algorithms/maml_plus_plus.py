"""MAML++ (Antoniou et al. 2019, arXiv 1810.09502): MAML whose objective and order change during training.

Section 4 of the paper: the query loss after every inner step counts, with weights that go over to the last step
(multi-step loss with annealed weights); first order at the beginning, second order later (derivative-order annealing).
Rates per layer and step are those of the inner rule: ``InnerRule(learn_rates=True, rates_per_step=True)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meta_peft.algorithms.maml import MAML


@dataclass(frozen=True)
class MAMLPlusPlus:
    """
    Args:
        maml: what training ends with.
        multi_step_until: outer step at which only the loss after the last inner step counts.
        first_order_until: outer step before which inner gradients are constants.
    """

    maml: MAML
    multi_step_until: int = 0
    first_order_until: int = 0

    def at(self, outer_step: int) -> MAML:
        """The algorithm of this outer step."""
        left = max(0.0, 1 - outer_step / self.multi_step_until) if self.multi_step_until else self.maml.multi_step
        return replace(
            self.maml, multi_step=left, first_order=self.maml.first_order or outer_step < self.first_order_until
        )
