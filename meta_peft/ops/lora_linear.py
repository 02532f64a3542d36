"""A LoRA layer as one operation, with its first and second derivatives written out.

``y = x W^T + b + h B^T`` with ``h = s x A^T``; for a stack each task has its own A ``[r, in]`` and B ``[out, r]``. W is
frozen. With ``u = s g B`` the backward is ``dx = g W + u A``, ``dA = u^T x``, ``dB^T = h^T g``. For cotangents p, P, Q
of these three, and ``v = s (p A^T + x P^T)``, ``w = s g Q^T``, the backward of the backward is

    dg = p W^T + v B^T + h Q      dx = u P + w A      dA = u^T p + w^T x      dB^T = v^T g

Composed of single operations the same takes several passes over tensors of the size of y for each product: scaling,
adding the adapter's part, summing gradients. Here the adapter's part is accumulated onto the frozen product, and
everything else has the width r of the adapter. Such narrow matrices are kept lying, ``h^T [r, R]``, ``B^T [r, out]``: with
the long side last, products with them are up to five times faster on a CPU. The frozen weight is not saved (see
`frozen.linear`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meta_peft.frozen.linear import frozen_bias, quantised_layers, times_frozen
from meta_peft.ops.last_derivative import last_derivative


def is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether `lora_linear` computes what PEFT's forward of `layer` does, in evaluation mode with one active adapter."""
    base = layer.get_base_layer()
    return (
        (type(base) in (nn.Linear, Conv1D) or bool(quantised_layers(base)))
        and adapter not in layer.lora_variant
        and all(
            type(part[adapter]) is nn.Linear and part[adapter].bias is None for part in (layer.lora_A, layer.lora_B)
        )
    )


def lora_linear(
    x: Tensor, a: Tensor, b: Tensor, base: nn.Module, scaling: float, *, at: Tensor | None = None
) -> Tensor:
    """``x W^T + bias + scaling x A^T B^T``: x is ``[B, L, in]``; A ``[r, in]`` and B ``[out, r]``, or stacks of them.

    Where not all of the ``B * L`` positions are needed, `at` has those that are: at others ``x W^T`` is taken for zero.
    """
    n_tasks = max(a.shape[0] if a.dim() == 3 else 1, b.shape[0] if b.dim() == 3 else 1)
    a = a if a.dim() == 3 and a.shape[0] == n_tasks else a.expand(n_tasks, *a.shape[-2:])
    b = b if b.dim() == 3 and b.shape[0] == n_tasks else b.expand(n_tasks, *b.shape[-2:])
    rows = x.reshape(n_tasks, -1, x.shape[-1])
    y: Tensor = _LoraProduct.apply(rows, a, b.transpose(1, 2).contiguous(), base, scaling, at)
    return y.view(*x.shape[:-1], -1)


class _Frozen(NamedTuple):
    """The frozen weight, and the rows that products with it are needed at."""

    base: nn.Module
    at: Tensor | None

    def times(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        return times_frozen(x, self.base, transposed=transposed, at=self.at)


class _LoraProduct(torch.autograd.Function):
    """Rows ``[T, R, in]``, A ``[T, r, in]``, B^T ``[T, r, out]`` -> ``[T, R, out]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, bt: Tensor, base: nn.Module, scaling: float, at: Tensor | None
    ) -> Tensor:
        ht = _narrow(x, a, scaling)
        ctx.save_for_backward(x, a, bt, ht)
        ctx.frozen, ctx.scaling = _Frozen(base, at), scaling
        y, bias = _wide(ctx.frozen.times(x), ht, bt), frozen_bias(base, x.dtype)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, da, dbt = _Backward.apply(grads[0], *ctx.saved_tensors, ctx.frozen, ctx.scaling, ctx.needs_input_grad[0])
        return dx, da, dbt, None, None, None


class _Backward(torch.autograd.Function):
    """Its gradients with respect to the rows (None if not `toward_rows`), A and B^T.

    h^T comes along as plain numbers: what depends on x and A through it is in the formulas.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        a: Tensor,
        bt: Tensor,
        ht: Tensor,
        frozen: _Frozen,
        scaling: float,
        toward_rows: bool,
    ) -> Any:
        ut = _narrow(g, bt, scaling)
        ctx.save_for_backward(g, x, a, bt, ht, ut)
        ctx.frozen, ctx.scaling = frozen, scaling
        ctx.set_materialize_grads(False)
        dx = _wide(frozen.times(g, transposed=True), ut, a) if toward_rows else None
        return dx, _outer(ut, x), _outer(ht, g)

    @staticmethod
    @last_derivative
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], p: Tensor | None, of_a: Tensor | None, of_bt: Tensor | None
    ) -> Any:
        g, x, a, bt, ht, ut = saved
        of_a = torch.zeros_like(a) if of_a is None else of_a
        of_bt = torch.zeros_like(bt) if of_bt is None else of_bt
        vt, wt = _narrow(x, of_a, ctx.scaling), _narrow(g, of_bt, ctx.scaling)
        da = _outer(wt, x)
        if p is None:
            dg = torch.zeros_like(g)
        else:
            vt += _narrow(p, a, ctx.scaling)
            da += _outer(ut, p)
            dg = ctx.frozen.times(p)
        dg = _wide(dg, torch.cat([vt, ht], 1), torch.cat([bt, of_bt], 1))
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _outer(torch.cat([ut, wt], 1).transpose(1, 2), torch.cat([of_a, a], 1)).to(x.dtype)
        return dg, dx, da, _outer(vt, g), None, None, None, None


def _narrow(x: Tensor, a: Tensor, scaling: float) -> Tensor:
    """``s A x^T``, ``[T, r, R]``, in the precision of A."""
    return torch.bmm(a, x.to(a.dtype).transpose(1, 2)).mul_(scaling)


def _wide(y: Tensor, ht: Tensor, bt: Tensor) -> Tensor:
    """``y + h B^T``, in place where the precisions are the same."""
    h = ht.transpose(1, 2)
    if y.dtype == bt.dtype:
        return y.baddbmm_(h, bt)
    return torch.baddbmm(y.to(bt.dtype), h, bt).to(y.dtype)


def _outer(ht: Tensor, x: Tensor) -> Tensor:
    """``h^T x``, ``[T, r, features]``."""
    return torch.bmm(ht, x.to(ht.dtype))
