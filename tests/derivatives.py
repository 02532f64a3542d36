"""What tests of derivatives share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

STENCIL = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}  # central differences of fourth order


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
    )


def up_to_second(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value of `function`, its vector-Jacobian product with random numbers, and the derivative of that along others.

    The same random numbers whatever the function, so that two functions can be compared.
    """
    value = function(*inputs)
    first = torch.autograd.grad(value, inputs, randn(*value.shape, seed=1, grad=False).to(value), create_graph=True)
    along = [randn(*g.shape, seed=2 + i, grad=False).to(g) for i, g in enumerate(first)]
    second = torch.autograd.grad(first, inputs, along)
    return [t.detach() for t in (value, *first, *second)]


def third_derivative(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Of `function` with something added that has one, so that a missing part would go unnoticed."""
    value = function(x).sum() + (x**4).sum()
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value


@contextmanager
def noting_saved_tensors() -> Iterator[list[Tensor]]:
    """Everything that autograd saves inside this context, whether it is still there or not."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
