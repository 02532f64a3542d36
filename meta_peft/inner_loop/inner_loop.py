"""The one inner loop. Meta-training, evaluation and use all go through it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from meta_peft.functional.slow_prefix import held_below
from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import expand, gradients, leaves
from meta_peft.types import LossFn, Params, Rows


def start(adapter: Params, rule: InnerRule, n_tasks: int, *, stacked: bool = False) -> tuple[Params, Params]:
    """The fast weights as a stack over tasks, equal copies unless `stacked` already, and the slow weights, detached."""
    fast, slow = rule.split({name: p.detach() for name, p in adapter.items()})
    return (fast if stacked else expand(fast, n_tasks)), slow


def recorded(loss_fn: LossFn, losses: list[Tensor]) -> LossFn:
    """`loss_fn`, with the numbers of each call added to `losses`."""

    def recording(adapter: Params, rows: Rows) -> Tensor:
        loss_T = loss_fn(adapter, rows)
        losses.append(loss_T.detach())
        return loss_T

    return recording


def adapt(
    loss_fn: LossFn,
    adapter: Params,
    hyper: Params,
    support: Rows,
    rule: InnerRule,
    *,
    steps: int | None = None,
    after_step: Callable[[int, Params], None] = lambda step, adapted: None,
    stacked: bool = False,
) -> Params:
    """`steps` updates of each task's own copy of `adapter` on its support rows, as plain numbers.

    Args:
        adapter: where all tasks start, ``[out, in]`` each; or, if `stacked`, a stack of starts ``[T, out, in]``.
        after_step: called with k and the adapter, with k = 0 before the first step and after each step.

    Returns:
        The adapter of each task, ``[T, out, in]``; slow weights (see `InnerRule.fast`) are as they were.
    """
    fast, slow = start(adapter, rule, support.n_tasks, stacked=stacked)
    hyper = {name: value.detach() for name, value in hyper.items()}

    def adapted() -> Params:
        all_of_them = {**(slow if stacked else expand(slow, support.n_tasks)), **fast}
        return {name: all_of_them[name].detach() for name in adapter}

    state = rule.init(fast)
    after_step(0, adapted())
    with held_below(loss_fn, fast, support):
        for step in range(rule.steps if steps is None else steps):
            at = leaves(fast)
            grads = gradients(loss_fn({**slow, **at}, support).sum(), at)
            fast, state = rule.step(step, fast, grads, state, hyper)
            after_step(step + 1, adapted())
    return adapted()
