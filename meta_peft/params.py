"""Arithmetic on flat dicts of tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from meta_peft.types import Params


def gradients(loss: Tensor, params: Params, *, create_graph: bool = False) -> Params:
    """``d loss / d params``; zeros for a parameter that the loss does not depend on."""
    values = list(params.values())
    grads = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}


def expand(params: Params, n_tasks: int) -> Params:
    """A stack of `n_tasks` equal copies, ``[out, in] -> [T, out, in]``, without copying memory."""
    return {name: p.expand(n_tasks, *p.shape) for name, p in params.items()}


def dot(a: Params, b: Params) -> Tensor:
    """The inner product of two stacks, one for each task, ``[T]``."""
    return torch.stack([(a[name] * b[name]).flatten(1).sum(1) for name in a]).sum(0)


def per_task(value_T: Tensor, like: Tensor) -> Tensor:
    """``[T]`` in a shape that multiplies the tasks of a stack."""
    return value_T.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def leaves(params: Params) -> Params:
    """The same values as fresh leaves of the autograd graph."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def take_task(params: Params, task: int) -> Params:
    """One task's weights ``[out, in]`` out of a stack, detached and copied."""
    return {name: p[task].detach().clone() for name, p in params.items()}


def weighted_sum(terms: Iterable[tuple[float, Params]]) -> Params:
    """``sum_i weight_i * params_i``."""
    total: Params = {}
    for weight, params in terms:
        for name, p in params.items():
            total[name] = total[name] + weight * p if name in total else weight * p
    return total


def flatten(params: Params) -> Tensor:
    """All values in one vector, in the order of the dict."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of `flatten`: names and shapes are those of `like`."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts, strict=True)}
