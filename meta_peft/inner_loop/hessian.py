"""The gradient of the tasks' losses at a point, and products of its derivative with a vector.

For fast weights f (a stack, each task its own) and slow weights s (shared), ``g(f, s) = d/df sum_t L_t(f_t, s)``. What
second order needs is, for a cotangent u of g, the pair ``(d/df <g, u>, d/ds <g, u>)``: u times the Hessian, and u times
the mixed derivative. Exactly, by differentiating g's graph; or by central differences of first-order gradients,

    d <g, u> = (grad L(f + h u, s) - grad L(f - h u, s)) / 2 h,

for which the model is differentiated once only, so that fused attention kernels do. Each task has its own h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meta_peft.params import dot, gradients, leaves, per_task
from meta_peft.types import LossFn, Params, Rows


class GradientGraph:
    """g at one point with its graph; `values` are its numbers, `loss_T` those of the losses."""

    def __init__(self, loss_fn: LossFn, fast: Params, slow: Params, rows: Rows):
        self._fast, self._slow = leaves(fast), leaves(slow)
        loss_T = loss_fn({**self._slow, **self._fast}, rows)
        self.loss_T = loss_T.detach()
        self._grads = gradients(loss_T.sum(), self._fast, create_graph=True)
        self.values: Params = {name: g.detach() for name, g in self._grads.items()}

    def product(self, u: Params, *, last: bool = True) -> tuple[Params, Params]:
        """u times the Hessian and the mixed derivative. The graph is freed by the `last` product."""
        outputs = {name: g for name, g in self._grads.items() if g.requires_grad}  # a constant gradient has no graph
        inputs = {**self._fast, **self._slow}
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if outputs:
            found = torch.autograd.grad(
                list(outputs.values()),
                list(inputs.values()),
                [u[name] for name in outputs],
                allow_unused=True,
                retain_graph=not last,
            )
        filled = {n: torch.zeros_like(p) if v is None else v for (n, p), v in zip(inputs.items(), found, strict=True)}
        if last:
            self._grads = {}
        return {n: filled[n] for n in self._fast}, {n: filled[n] for n in self._slow}


def difference_product(
    loss_fn: LossFn, fast: Params, slow: Params, rows: Rows, u: Params, *, wider: float = 1.0
) -> tuple[Params, Params]:
    """The same by central differences. `wider` multiplies the step h, which is chosen by precision and norms."""
    h_T = wider * _step(fast, u)
    sides: list[tuple[Params, Params]] = []
    for sign in (1, -1):
        at = leaves({n: p + sign * per_task(h_T, p) * u[n] for n, p in fast.items()})
        # A task's share in the gradient of slow weights has to be divided by that task's own h, before tasks are summed.
        grads = _gradients(loss_fn, at, leaves(slow), rows, 1 / h_T if slow else None)
        sides.append(grads)
    (plus, plus_slow), (minus, minus_slow) = sides
    of_fast = {
        n: (plus[n] - minus[n]) / 2 if slow else (plus[n] - minus[n]) / (2 * per_task(h_T, plus[n])) for n in fast
    }
    return of_fast, {n: (plus_slow[n] - minus_slow[n]) / 2 for n in slow}


def _gradients(
    loss_fn: LossFn, fast: Params, slow: Params, rows: Rows, weight_T: Tensor | None
) -> tuple[Params, Params]:
    loss_T = loss_fn({**slow, **fast}, rows)
    loss = loss_T.sum() if weight_T is None else (loss_T * weight_T).sum()
    grads = gradients(loss, {**fast, **slow})
    return {n: grads[n] for n in fast}, {n: grads[n] for n in slow}


def _step(fast: Params, u: Params) -> Tensor:
    """``[T]``: a change of the weights by 3 % of the cube root of the precision, relative to their size.

    The cube root balances truncation and rounding; the factor is what was best on SmolLM2 (`benchmarks/precision.py`).
    """
    first = next(iter(fast.values()))
    size_T, length_T = dot(fast, fast).sqrt(), dot(u, u).sqrt()
    change = 0.03 * torch.finfo(first.dtype).eps ** (1 / 3)
    return change * (1 + size_T) / length_T.clamp_min(torch.finfo(first.dtype).tiny ** 0.5)
