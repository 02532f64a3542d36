"""Attention, ``o = P v`` with ``P = softmax(s q k^T + mask)`` along rows (Vaswani et al. 2017, arXiv 1706.03762).

The Jacobian of a softmax is symmetric: ``J x = P (x - <P x>)``, with sums over a row in brackets. With ``A = g v^T`` and
``Z = J A`` the backward is

    dq = s Z k      dk = s Z^T q      dv = P^T g

For cotangents x, y, w of these three, the scores move by ``C = s (x k^T + q y^T)`` and P by ``T = J C = P C'``, where
``C' = C - <P C>``. With ``X = C' Z + P (g w^T)`` and ``Y = X - P <X>`` the backward of the backward is

    dg = T v + P w      dq = s (Y k + Z y)      dk = s (Y^T q + Z^T x)      dv = T^T g

Kept of the size of P are P and Z alone. Where several query heads share a head of keys and values (Ainslie et al. 2023,
arXiv 2305.13245), their rows are one matrix, and no keys or values are copied for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meta_peft.ops.last_derivative import last_derivative


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q is ``[B, H, L, D]``, k and v ``[B, K, S, D]`` where K divides H; computed in float32 at least.

    mask is broadcast to ``[B, H, L, S]``: True where attention goes, or numbers to be added, which get no gradient. A
    row that may look nowhere gives zeros, as in `torch.nn.functional.scaled_dot_product_attention`.
    """
    n_groups = k.shape[0] * k.shape[1]
    rows, keys, values = (_wide(t).reshape(n_groups, -1, t.shape[-1]) for t in (q, k, v))
    o: Tensor = _Attention.apply(rows, keys, values, mask, scale, q.shape[:3])
    return o.view(*q.shape[:3], -1).to(q.dtype)


class _Attention(torch.autograd.Function):
    """Rows ``[N, R, D]``, keys and values ``[N, S, D]`` -> ``[N, R, D]``, for N groups of heads with R rows each."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, heads: torch.Size) -> Any:
        p = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        p = _softmax(p.view(*heads, -1), mask).view_as(p)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dq, dk, dv = _Backward.apply(grads[0], *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad[:3])
        return dq, dk, dv, None, None, None


class _Backward(torch.autograd.Function):
    """The gradients that `wanted` says, of rows, keys and values; None for the others.

    P comes along as plain numbers: what depends on q and k through it is in the formulas.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float, wanted: tuple[bool, ...]
    ) -> Any:
        g = g.reshape(q.shape[0], -1, v.shape[-1])
        z = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
        ctx.save_for_backward(g, q, k, v, p, z)
        ctx.scale = scale
        dq = torch.bmm(z, k).mul_(scale) if wanted[0] else None
        dk = torch.bmm(z.transpose(1, 2), q).mul_(scale) if wanted[1] else None
        return dq, dk, torch.bmm(p.transpose(1, 2), g) if wanted[2] else None

    @staticmethod
    @last_derivative
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Any) -> Any:
        g, q, k, v, p, z = saved
        x, y, w = (torch.zeros_like(t) if u is None else u for u, t in zip(grads, (q, k, v), strict=True))
        s, wanted = ctx.scale, ctx.needs_input_grad[1:4]
        c = torch.bmm(x, k.transpose(1, 2)).baddbmm_(q, y.transpose(1, 2), beta=s, alpha=s)
        t = p * c
        mean = t.sum(-1, keepdim=True)
        t.addcmul_(p, mean, value=-1)
        dg = torch.bmm(t, v).baddbmm_(p, w)
        dv = torch.bmm(t.transpose(1, 2), g) if wanted[2] else None
        change = c.sub_(mean).mul_(z).addcmul_(p, torch.bmm(g, w.transpose(1, 2)))
        change.addcmul_(p, change.sum(-1, keepdim=True), value=-1)
        dq = torch.bmm(change, k).baddbmm_(z, y, beta=s, alpha=s) if wanted[0] else None
        dk = torch.bmm(change.transpose(1, 2), q).baddbmm_(z.transpose(1, 2), x, beta=s, alpha=s) if wanted[1] else None
        return dg, dq, dk, dv, None, None, None


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the last dimension, in place of the scores before it."""
    if mask is None:
        return torch.softmax(scores, -1)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
        nowhere = ~mask.any(-1, keepdim=True)
    else:
        scores.add_(mask)
        nowhere = (mask == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill_(nowhere, 0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
