"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): ``y = w n``, ``n = r x``, ``r = (mean x^2 + eps)^(-1/2)``, w frozen.

The Jacobian of n is symmetric, ``J = r (1 - n n^T / size)``. With ``h = w g`` the backward is ``dx = J h``; for its
cotangent p the backward of the backward is ``dg = w J p`` and, with the means ``a = <p n>``, ``m = <h n>``, ``c = <p h>``,

    dx = r^2 ((3 a m - c) n - m p - a h)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meta_peft.ops.last_derivative import last_derivative


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x is ``[..., size]``, weight ``[size]``; computed in float32 at least, rounded to the dtype of x, then weighted."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        n = (wide * r).to(x.dtype)
        return n.mul_(weight) if weight.dtype == n.dtype else n * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Backward.apply(grads[0], *ctx.saved_tensors), None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, weight, r)
        n, h = _wide(x) * r, _wide(g) * weight
        return _jacobian(n, r, h).to(x.dtype)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Any) -> Any:
        g, x, weight, r = saved
        p = _wide(grads[0])
        n, h = _wide(x) * r, _wide(g) * weight
        a, m, c = _mean(p, n), _mean(h, n), _mean(p, h)
        dg = _jacobian(n, r, p, a).mul_(weight).to(g.dtype)
        dx = n.mul_(3 * a * m - c).addcmul_(p, m, value=-1).addcmul_(h, a, value=-1).mul_(r * r)
        return dg, dx.to(x.dtype), None, None


def _jacobian(n: Tensor, r: Tensor, h: Tensor, mean: Tensor | None = None) -> Tensor:
    mean = _mean(h, n) if mean is None else mean
    return torch.addcmul(h, n, mean, value=-1).mul_(r)


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
