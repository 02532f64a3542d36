"""Implicit MAML (Rajeswaran et al. 2019, arXiv 1909.04630).

The inner loop minimises ``L_support,t(phi) + lambda / 2 |phi - theta|^2``. At its minimum phi*, the meta-gradient is

    mean_t v_t  with  (I + H_t / lambda) v_t = grad L_query,t(phi*_t),    H_t the Hessian of L_support,t at phi*_t,

whatever path led there. v is found by conjugate gradients, or by the Neumann series ``v <- grad L_query - H v / lambda``,
which converges only where lambda is larger than every eigenvalue of H. Slow weights s get
``grad_s L_query - v^T d/ds grad L_support / lambda``; rates are not learned. It is exact only as far as the inner steps
reach the minimum: take many of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.inner_loop.hessian import GradientGraph, difference_product
from meta_peft.inner_loop.inner_loop import adapt, recorded, start
from meta_peft.inner_loop.inner_path import check_memory
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import check_rule
from meta_peft.params import dot, gradients, leaves, per_task
from meta_peft.types import SUPPORT_LOSSES, EpisodeBatch, LossFn, Meta, MetaGradient, Params, Rows
from meta_peft.utils.checked import is_whole, shown

SOLVERS = ("cg", "neumann")


@dataclass(frozen=True)
class ImplicitMAML:
    """
    Args:
        inner: the inner rule; its `proximal` is lambda.
        solver: "cg" or "neumann".
        iterations: of the solver, each one product with the Hessian.
        memory: "finite_differences" keeps no graph; every other mode keeps that of one gradient.
    """

    inner: InnerRule = field(default_factory=lambda: InnerRule(proximal=1.0))
    solver: str = "cg"
    iterations: int = 5
    memory: str | int = "auto"
    adapts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rule(self.inner)
        if not self.inner.proximal:
            raise MetaPeftError("Implicit MAML needs the pull towards the start: set proximal (lambda) above 0.")
        if self.inner.learn_rates:
            raise MetaPeftError("Implicit MAML gives no gradient for the inner rates: set learn_rates=False.")
        if getattr(self.inner.optimizer, "weight_decay", 0.0):
            raise MetaPeftError(
                "Implicit MAML differentiates the minimum of the loss with the pull towards the start, which is not where"
                " weight decay leads: set inner_weight_decay to 0."
            )
        check_memory(self.memory)
        if self.solver not in SOLVERS:
            raise MetaPeftError(f"solver must be one of {', '.join(SOLVERS)}; got {self.solver!r}.")
        if not (is_whole(self.iterations) and self.iterations >= 1):
            raise MetaPeftError(f"iterations must be 1 or more, got {shown(self.iterations)}: a whole number.")

    @property
    def second_order(self) -> bool:
        return self.memory != "finite_differences"

    def products(self, support: int, query: int) -> int:
        """Matrix products of one row with one adapted layer that a task costs."""
        hessian = 2 + 2 * (self.iterations + 1) if self.second_order else 4 * (self.iterations + 1)
        return support * (2 * self.inner.steps + hessian) + 2 * query

    def __call__(self, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
        losses: list[Tensor] = []

        def with_given(adapter: Params, rows: Rows) -> Tensor:
            return loss_fn({**meta.given, **adapter}, rows)

        end = adapt(recorded(with_given, losses), meta.adapter, meta.hyper, batch.support, self.inner)
        fast, _ = self.inner.split(end)
        slow = {**start(meta.adapter, self.inner, batch.n_tasks)[1], **meta.given}
        at = {"fast": leaves(fast), "slow": leaves(slow)}
        loss_T = loss_fn({**at["slow"], **at["fast"]}, batch.query)
        grads = gradients(loss_T.sum(), {**at["fast"], **at["slow"]})
        right = {n: grads[n] for n in fast}

        graph = GradientGraph(loss_fn, fast, slow, batch.support) if self.second_order else None

        def product(v: Params, *, last: bool = False) -> tuple[Params, Params]:
            """``H v / lambda`` and ``v^T d/ds grad L_support / lambda``."""
            if graph is not None:
                of_fast, of_slow = graph.product(v, last=last)
            else:
                of_fast, of_slow = difference_product(loss_fn, fast, slow, batch.support, v)
            return _scaled(of_fast, 1 / self.inner.proximal), _scaled(of_slow, 1 / self.inner.proximal)

        solve = _conjugate_gradients if self.solver == "cg" else _neumann
        v = solve(lambda v: product(v)[0], right, self.iterations)
        at_v, through_slow = product(v, last=True)
        residual = {n: right[n] - v[n] - at_v[n] for n in right}
        found = {n: p.sum(0) for n, p in v.items()} | {n: grads[n] - through_slow[n] for n in slow}
        mean = {n: found[n] / batch.n_tasks for n in (*meta.adapter, *meta.given)}
        of_meta = Meta({n: mean[n] for n in meta.adapter}, {}, {n: mean[n] for n in meta.given})
        error_T = dot(residual, residual).sqrt() / dot(right, right).sqrt()
        on_the_way = {SUPPORT_LOSSES: torch.stack(losses, 1)} if losses else {}
        metrics = {"loss": loss_T.detach(), "residual": error_T, **on_the_way}
        return MetaGradient(of_meta, batch.n_tasks, metrics)


def _conjugate_gradients(product: Callable[[Params], Params], right: Params, iterations: int) -> Params:
    """v with ``v + product(v) = right``, every task by itself (Hestenes & Stiefel 1952), from v = right."""
    v = right
    r = {n: -p for n, p in product(v).items()}
    d, squared_T = r, dot(r, r)
    for _ in range(iterations - 1):
        of_d = {n: d[n] + p for n, p in product(d).items()}
        length_T = _ratio(squared_T, dot(d, of_d))
        v = _plus(v, length_T, d)
        r = _plus(r, -length_T, of_d)
        before_T, squared_T = squared_T, dot(r, r)
        d = _plus(r, _ratio(squared_T, before_T), d)
    return v


def _neumann(product: Callable[[Params], Params], right: Params, iterations: int) -> Params:
    v = right
    for _ in range(iterations):
        v = {n: right[n] - p for n, p in product(v).items()}
    return v


def _plus(a: Params, factor_T: Tensor, b: Params) -> Params:
    return {n: torch.addcmul(a[n], per_task(factor_T, a[n]), b[n]) for n in a}


def _scaled(a: Params, factor: float) -> Params:
    return {n: factor * p for n, p in a.items()}


def _ratio(a_T: Tensor, b_T: Tensor) -> Tensor:
    """0 where both are 0: that task's system is solved already."""
    return torch.where(b_T == 0, torch.zeros_like(a_T), a_T / torch.where(b_T == 0, torch.ones_like(b_T), b_T))
