"""Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400).

``meta-gradient = d/d(theta, rates) mean_t L_query,t(theta'_t)``, where theta'_t is theta after the inner steps on the
support rows of task t. `first_order` treats the inner gradients as constants (section 5.2 of the paper); learned rates
still receive their gradient, since an update depends on its rate directly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_peft.inner_loop import adapt_differentiably
from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import expand, gradients, leaves
from meta_peft.types import EpisodeBatch, LossFn, Meta, MetaGradient


@dataclass(frozen=True)
class MAML:
    inner: InnerRule = field(default_factory=InnerRule)
    first_order: bool = False

    @property
    def second_order(self) -> bool:
        return not self.first_order and self.inner.steps > 0

    def __call__(self, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
        adapter, hyper = leaves(meta.adapter), leaves(meta.hyper)
        fast = expand(adapter, batch.n_tasks)
        fast = adapt_differentiably(loss_fn, fast, hyper, batch.support, self.inner, second_order=self.second_order)
        loss_T = loss_fn(fast, batch.query)
        learned = {**adapter, **hyper} if self.inner.learn_rates else adapter
        grads = gradients(loss_T.mean(), learned)
        split = Meta({name: grads[name] for name in adapter}, {n: g for n, g in grads.items() if n in hyper})
        return MetaGradient(split, batch.n_tasks, {"loss": loss_T.detach()})
