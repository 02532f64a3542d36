"""An error where a derivative is asked for that no operation of this package has."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results raise when they are differentiated, from a function that is given the saved tensors too.

    `torch.autograd.function.once_differentiable` raises only where the incoming gradients have a graph. Where results
    depend on the inputs through saved tensors, it returns constants, and the derivative of a sum of this operation with
    others comes out wrong instead.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # once only: each look at them may be a layer computed again
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *saved) if t is not None]
        return tuple(r if r is None else _End.apply(r, *sources) for r in results)

    return wrapper


class _End(torch.autograd.Function):
    """Its first argument, as something that depends on all of them."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("The operations of meta_peft.ops have first and second derivatives, and no third one.")
