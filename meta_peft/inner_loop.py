"""The one inner loop. Meta-training, evaluation and use all go through it."""

from __future__ import annotations

from collections.abc import Callable

from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import gradients, leaves
from meta_peft.types import LossFn, Params, Rows


def start(adapter: Params, rule: InnerRule, n_tasks: int) -> tuple[Params, Params]:
    """The fast weights as a stack ``[T, out, in]`` of equal copies, and the slow weights ``[out, in]``, detached."""
    fast, slow = rule.split({name: p.detach() for name, p in adapter.items()})
    return {n: p if p.dim() == 3 else p.expand(n_tasks, *p.shape) for n, p in fast.items()}, slow


def adapt(
    loss_fn: LossFn,
    adapter: Params,
    hyper: Params,
    support: Rows,
    rule: InnerRule,
    *,
    steps: int | None = None,
    after_step: Callable[[int, Params], None] = lambda step, adapted: None,
) -> Params:
    """`steps` updates of each task's own copy of `adapter` on its support rows, as plain numbers.

    Args:
        adapter: ``[out, in]`` each, where all tasks start; or a stack ``[T, out, in]`` of starts.
        after_step: called with k and the adapter, with k = 0 before the first step and after each step.

    Returns:
        The adapter with fast weights ``[T, out, in]``; slow ones (see `InnerRule.fast`) as they were.
    """
    names = list(adapter)
    fast, slow = start(adapter, rule, support.n_tasks)
    hyper = {name: value.detach() for name, value in hyper.items()}

    def adapted() -> Params:
        both = {**slow, **fast}
        return {name: both[name].detach() for name in names}

    state = rule.init(fast)
    after_step(0, adapted())
    for step in range(rule.steps if steps is None else steps):
        fast = leaves(fast)
        grads = gradients(loss_fn({**slow, **fast}, support).sum(), fast)
        fast, state = rule.step(step, {n: p.detach() for n, p in fast.items()}, grads, state, hyper)
        after_step(step + 1, adapted())
    return adapted()
