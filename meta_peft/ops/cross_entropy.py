"""``loss = logsumexp(z) - z[label]`` for each row of logits.

With ``p = softmax(z)`` and e the one-hot label, the backward is ``dz = g (p - e)``; for its cotangent c the backward of
the backward is ``dg = <c, p - e>``, ``dz = g p (c - <c, p>)``. Two tensors of the logits' size are kept for both, the
logits and p: over a vocabulary these are the largest tensors there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meta_peft.ops.last_derivative import last_derivative


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """One loss per row, ``[N]``, in float32 at least."""
    loss_N: Tensor = _CrossEntropy.apply(logits_NV, labels_N)
    return loss_N


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        log_p = torch.log_softmax(wide, -1)
        loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, labels, log_p.exp_())
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Backward.apply(grads[0], *ctx.saved_tensors), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, logits: Tensor, labels: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(g, labels, p, logits)  # logits for the error of a third derivative alone
        ctx.dtype = logits.dtype
        dz = p * g.unsqueeze(-1)
        dz.scatter_add_(-1, labels.unsqueeze(-1), -g.unsqueeze(-1))
        return dz.to(logits.dtype)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Any) -> Any:
        g, labels, p, _ = saved
        c = grads[0].to(p.dtype)
        dz = p * c
        mean = dz.sum(-1, keepdim=True)
        dg = mean.squeeze(-1) - c.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        dz.addcmul_(p, mean, value=-1).mul_(g.unsqueeze(-1))
        return dg, dz.to(ctx.dtype), None, None
