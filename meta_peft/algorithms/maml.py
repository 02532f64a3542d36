"""Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400).

``meta-gradient = d/d(theta, rates) mean_t L_query,t(theta'_t)``, where theta'_t is theta after the inner steps on the
support rows of task t. `first_order` treats the inner gradients as constants (section 5.2 of the paper); learned rates
still receive their gradient, since an update depends on its rate directly. In between, truncated back-propagation
(Shaban et al. 2019, arXiv 1810.10667) differentiates the inner gradients of the last steps only.

With `multi_step` the objective is that of MAML++ (Antoniou et al. 2019, arXiv 1810.09502, section 4),
``sum_k w_k L_query(theta^(k))`` over the inner steps k, with ``w_k = multi_step / K``, and ``1 - multi_step`` more for
the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.inner_loop.inner_path import Adjoint, InnerPath, Remember, check_memory
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import check_rule
from meta_peft.params import gradients, leaves
from meta_peft.types import SUPPORT_LOSSES, EpisodeBatch, LossFn, Meta, MetaGradient, Params
from meta_peft.utils.checked import flag, is_number, is_whole, shown


@dataclass(frozen=True)
class MAML:
    """
    Args:
        inner: the inner rule.
        first_order: all inner gradients are constants.
        second_order_steps: inner gradients of this many last steps are differentiated; None means all.
        memory: "unrolled" keeps the graphs of all inner steps, "replay" none of them, a number those of this many last
            steps; results are the same. "finite_differences" takes central differences instead of graphs. "auto" is
            "unrolled" unless `meta_gradient` finds that this would not fit.
        multi_step: how much of the objective, from 0 to 1, is the mean of the query losses after each inner step.
    """

    inner: InnerRule = field(default_factory=InnerRule)
    first_order: bool = False
    second_order_steps: int | None = None
    memory: str | int = "auto"
    multi_step: float = 0.0
    adapts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rule(self.inner)
        flag("first_order", self.first_order)
        check_memory(self.memory)
        steps = self.second_order_steps
        if steps is not None and not (is_whole(steps) and steps >= 0):
            raise MetaPeftError(
                f"second_order_steps must be 0 or more, or None; got {shown(steps)}: a whole number of inner steps."
            )
        if not (is_number(self.multi_step) and 0 <= self.multi_step <= 1):
            raise MetaPeftError(f"multi_step must be from 0 to 1, got {shown(self.multi_step)}: a number.")

    @property
    def differentiated_steps(self) -> int:
        """How many of the last inner gradients are differentiated."""
        asked = self.inner.steps if self.second_order_steps is None else min(self.second_order_steps, self.inner.steps)
        return 0 if self.first_order else asked

    @property
    def second_order(self) -> bool:
        """Whether the loss is differentiated twice."""
        return self.differentiated_steps > 0 and self.memory != "finite_differences"

    def __call__(self, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
        path = InnerPath(loss_fn, meta, batch.support, self.inner, self._remember())
        losses: list[Tensor] = []

        def query(fast: Params, weight: float) -> tuple[Params, Params]:
            """Adjoints of the fast and of the slow weights, from the query loss with its weight in the objective."""
            at, slow = leaves(fast), leaves(path.slow)
            loss_T = loss_fn({**slow, **at}, batch.query)
            losses.append(loss_T.detach())
            grads = gradients(weight * loss_T.sum(), {**at, **slow})
            return {n: grads[n] for n in at}, {n: grads[n] for n in slow}

        share = self.multi_step / max(self.inner.steps, 1)
        adjoint = Adjoint(*query(path.fast, 1 - self.multi_step + share))
        path.walk_back(adjoint, (lambda step, fast: query(fast, share)) if self.multi_step else None)

        total = {**{n: p.sum(0) for n, p in adjoint.fast.items()}, **adjoint.slow}
        adapter = {name: total[name] / batch.n_tasks for name in meta.adapter}
        given = {name: total[name] / batch.n_tasks for name in meta.given}
        hyper = {name: p / batch.n_tasks for name, p in adjoint.hyper.items()}
        if self.inner.learn_rates and not hyper:  # without steps nothing depends on rates
            hyper = {name: torch.zeros_like(p) for name, p in meta.hyper.items()}
        errors = {} if path.difference_error_T is None else {"hessian_error": path.difference_error_T}
        on_the_way = {SUPPORT_LOSSES: torch.stack(path.losses, 1)} if path.losses else {}
        return MetaGradient(Meta(adapter, hyper, given), batch.n_tasks, {"loss": losses[0], **on_the_way, **errors})

    @property
    def kept_graphs(self) -> int:
        """How many graphs of inner steps are kept at once; "auto" counts as "unrolled"."""
        asked = self.inner.steps if self.memory in ("auto", "unrolled") else self.memory
        return min(asked, self.differentiated_steps) if isinstance(asked, int) else 0

    def products(self, support: int, query: int) -> int:
        """Matrix products of one row with one adapted layer that a task costs, with its numbers of rows."""
        steps, differentiated = self.inner.steps, self.differentiated_steps
        rebuilt = differentiated - self.kept_graphs  # forward and backward once more
        wider = 4 if self.memory == "finite_differences" and differentiated else 0  # for the error of one product
        queries = steps if self.multi_step and steps else 1
        return support * (2 * steps + 2 * differentiated + 2 * rebuilt + wider) + 2 * query * queries

    def _remember(self) -> Remember:
        return Remember(
            self.differentiated_steps,
            graphs=self.kept_graphs,
            differences=self.memory == "finite_differences",
            stops=self.multi_step > 0,
        )
