"""Multi-task LoRA, the baseline that meta-learning has to beat: no inner loop.

``gradient = d/d theta mean_t (L_support,t(theta) + L_query,t(theta)) / 2``: one adapter for all tasks, trained on the
same rows as every other algorithm sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import check_rule
from meta_peft.params import gradients, leaves
from meta_peft.types import EpisodeBatch, LossFn, Meta, MetaGradient


@dataclass(frozen=True)
class MultiTask:
    inner: InnerRule = field(default_factory=InnerRule)  # how the adapter will be adapted; no part of training
    second_order = False
    adapts = False

    def __post_init__(self) -> None:
        check_rule(self.inner)

    def products(self, support: int, query: int) -> int:
        """Matrix products of one row with one adapted layer that a task costs."""
        return 2 * (support + query)

    def __call__(self, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
        adapter = leaves(meta.adapter)
        loss_T = (loss_fn(adapter, batch.support) + loss_fn(adapter, batch.query)) / 2
        grads = gradients(loss_T.mean(), adapter)
        return MetaGradient(Meta(grads, {}), batch.n_tasks, {"loss": loss_T.detach()})
