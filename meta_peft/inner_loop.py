"""The one inner loop. Meta-training, evaluation and use all go through it."""

from __future__ import annotations

from collections.abc import Callable

from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import gradients, leaves
from meta_peft.types import LossFn, Params, Rows


def adapt_differentiably(
    loss_fn: LossFn, fast: Params, hyper: Params, support: Rows, rule: InnerRule, *, second_order: bool
) -> Params:
    """`rule.steps` updates of a stack ``[T, out, in]`` on `support`, as a differentiable function of `fast` and `hyper`.

    With `second_order` the inner gradients are functions too; without, they are constants and only the updates'
    dependence on `fast` and `hyper` remains. The tasks of a stack do not interact: the gradient of the sum of their
    losses is the stack of their gradients.
    """
    state = rule.optimizer.init(fast)
    for step in range(rule.steps):
        grads = gradients(loss_fn(fast, support).sum(), fast, create_graph=second_order)
        fast, state = rule.step(step, fast, grads, state, hyper)
    return fast


def adapt(
    loss_fn: LossFn,
    fast: Params,
    hyper: Params,
    support: Rows,
    rule: InnerRule,
    *,
    steps: int | None = None,
    after_step: Callable[[int, Params], None] = lambda step, fast: None,
) -> Params:
    """The same updates as plain numbers: what is run at use and in evaluation.

    `after_step(k, fast)` is called with k = 0 before the first step and after each of the `steps` steps.
    """
    fast, hyper = leaves(fast), {name: value.detach() for name, value in hyper.items()}
    state = rule.optimizer.init(fast)
    after_step(0, fast)
    for step in range(rule.steps if steps is None else steps):
        grads = gradients(loss_fn(fast, support).sum(), fast)
        fast, state = rule.step(step, fast, grads, state, hyper)
        fast = leaves(fast)
        after_step(step + 1, fast)
    return {name: value.detach() for name, value in fast.items()}
