"""Reptile (Nichol et al. 2018, arXiv 1803.02999).

``meta-gradient = mean_t (theta - theta'_t)``, where theta'_t is theta after the inner steps on all rows of task t,
support and query together: Reptile has no query loss. Rates are not learned, and slow weights get no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.inner_loop.inner_loop import adapt, recorded
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import check_rule
from meta_peft.types import SUPPORT_LOSSES, EpisodeBatch, LossFn, Meta, MetaGradient, Params, Rows


@dataclass(frozen=True)
class Reptile:
    inner: InnerRule = field(default_factory=InnerRule)
    second_order = False
    adapts = True

    def __post_init__(self) -> None:
        check_rule(self.inner)
        if self.inner.steps < 1:
            raise MetaPeftError("Reptile learns from how far the inner steps move: inner_steps must be 1 or more.")
        if self.inner.learn_rates:
            raise MetaPeftError("Reptile gives no gradient for the inner rates: set learn_rates=False, or use MAML.")
        if self.inner.fast is not None:
            raise MetaPeftError("Reptile gives no gradient for slow weights: leave fast_weights out, or use MAML.")

    def products(self, support: int, query: int) -> int:
        """Matrix products of one row with one adapted layer that a task costs."""
        return 2 * self.inner.steps * (support + query)

    def __call__(self, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
        losses: list[Tensor] = []

        def both(fast: Params, rows: Rows) -> Tensor:
            return (loss_fn(fast, batch.support) + loss_fn(fast, batch.query)) / 2

        end = adapt(recorded(both, losses), meta.adapter, meta.hyper, batch.support, self.inner)
        moved = {name: (p.detach() - end[name]).mean(0) for name, p in meta.adapter.items()}
        metrics = {"loss": losses[-1], SUPPORT_LOSSES: torch.stack(losses, 1)}
        return MetaGradient(Meta(moved, {}), batch.n_tasks, metrics)
