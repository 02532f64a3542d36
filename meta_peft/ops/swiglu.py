"""``y = silu(a) * b``, the gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202).

With ``q = sigmoid(a)``, ``s = a q``, ``s' = q (1 + a (1 - q))`` and ``s'' = q (1 - q) (2 + a (1 - 2 q))`` the backward is
``da = g b s'``, ``db = g s``. For cotangents u, v of these two the backward of the backward is

    dg = u b s' + v s      da = g (u b s'' + v s')      db = g u s'
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meta_peft.ops.last_derivative import last_derivative

BLOCK = 1 << 17  # elements: what is read again should still be in a core's cache


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """a and b of the same shape and dtype."""
    y: Tensor = _SwiGLU.apply(a, b)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Backward.apply(grads[0], *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(g, a, b)
        return torch.ops.aten.silu_backward(g * b, a), F.silu(a).mul_(g)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Any) -> Any:
        g, a, b = (t.reshape(-1, t.shape[-1]) for t in saved)
        u, v = (t.reshape(-1, t.shape[-1]) for t in grads)
        dg, da, db = torch.empty_like(g), torch.empty_like(a), torch.empty_like(b)
        rows = max(1, BLOCK // a.shape[-1]) if a.device.type == "cpu" else max(1, a.shape[0])
        for block in zip(*(t.split(rows) for t in (g, a, b, u, v, dg, da, db)), strict=True):
            _second(*block)
        shape = saved[1].shape
        return dg.view(shape), da.view(shape), db.view(shape)


def _second(g: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor, dg: Tensor, da: Tensor, db: Tensor) -> None:
    q = torch.sigmoid(a)
    s, rest = q * a, 1 - q
    s1 = torch.addcmul(q, s, rest)
    s2 = rest.mul_(q).mul_((1 - 2 * q).mul_(a).add_(2))
    ub = u * b
    torch.mul(ub, s1, out=dg).addcmul_(v, s)
    torch.mul(ub, s2, out=da).addcmul_(v, s1).mul_(g)
    torch.mul(u, g, out=db).mul_(s1)
