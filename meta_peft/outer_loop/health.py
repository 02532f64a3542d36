"""Numbers that are not finite, and inner loops that go uphill: found, and said by name.

A meta-gradient is a mean over tasks, so one bad task spoils all of it, and a task whose inner loop diverged hides in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import gradients, leaves
from meta_peft.types import SUPPORT_LOSSES, EpisodeBatch, LossFn, Meta, MetaGradient, Params

UPHILL = 2.0, 0.1  # an inner loop diverges if it makes the support loss this many times as large, and this much larger


def diverged(gradient: MetaGradient, tasks: Sequence[str]) -> list[str]:
    """The tasks whose support loss before the last inner step was far above that before the first, or was no number."""
    losses_TK = gradient.metrics.get(SUPPORT_LOSSES)
    if losses_TK is None or losses_TK.shape[1] == 0:
        return []
    times, more = UPHILL
    first_T, last_T = losses_TK[:, 0], losses_TK[:, -1]
    fine_T = (last_T <= times * first_T) | (last_T <= first_T + more)
    return [task for task, fine in zip(tasks, fine_T.tolist(), strict=True) if not fine]


def is_finite(gradient: MetaGradient) -> bool:
    """Whether the losses and every number of the gradient are."""
    values = [*gradient.grads.adapter.values(), *gradient.grads.hyper.values(), gradient.metrics["loss"]]
    return all(bool(v.isfinite().all()) for v in values)


def what_is_not_finite(
    loss_fn: LossFn, meta: Meta, rule: InnerRule, batch: EpisodeBatch, gradient: MetaGradient
) -> str:
    """Which task, at which inner step, in which LoRA matrices: in words, for `gradient` of one task."""
    found: list[str] = []

    def look(step: int, adapted: Params) -> None:
        if found:
            return
        rows, where = (
            (batch.support, f"inner step {step + 1}") if step < rule.steps else (batch.query, "the query rows")
        )
        at = leaves(adapted)
        loss_T = loss_fn(at, rows)
        grads = gradients(loss_T.sum(), at)
        bad = [name for name, value in adapted.items() if not value.isfinite().all()]
        if bad:
            found.append(f"its weights at {where} in {_some(bad)}")
        elif not loss_T.isfinite().all():
            found.append(f"its loss at {where} ({float(loss_T.detach().sum())})")
        elif bad := [name for name, grad in grads.items() if not grad.isfinite().all()]:
            found.append(f"its gradient at {where} in {_some(bad)}")

    adapt(loss_fn, meta.adapter, meta.hyper, batch.support, rule, after_step=look)
    if not found:  # then it is a second derivative, or the derivative of an update
        grads_now: dict[str, Tensor] = {**gradient.grads.adapter, **gradient.grads.hyper}
        bad = [name for name, grad in grads_now.items() if not grad.isfinite().all()]
        found.append(f"its meta-gradient in {_some(bad)}")
    return f"task {batch.tasks[0]!r}: {found[0]}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
