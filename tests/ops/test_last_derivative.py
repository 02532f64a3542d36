from __future__ import annotations

from typing import Any

import pytest
import torch
from derivatives import randn
from torch import Tensor
from torch.autograd.function import once_differentiable

from meta_peft.ops.last_derivative import last_derivative


def cube(mark: Any) -> Any:
    """``x^3`` whose backward is differentiable once, by `mark`."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(g, x)
            return 3 * g * x**2

        @staticmethod
        @mark
        def backward(ctx: Any, *given: Any) -> Any:
            g, x = given[0] if mark is last_derivative else ctx.saved_tensors
            return None, 6 * g * x * given[-1]

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return Backward.apply(grads[0], *ctx.saved_tensors)

    return Cube.apply


def derivatives(function: Any, x: Tensor, order: int) -> Tensor:
    value = function(x).sum() + (x**4).sum()
    for _ in range(order):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value


def test_the_second_derivative_is_what_the_backward_returns():
    x = randn(3)
    torch.testing.assert_close(derivatives(cube(last_derivative), x, 2), 6 * x + 12 * x**2)


def test_a_third_derivative_raises_where_torch_alone_would_leave_a_part_out():
    x = randn(3)
    torch.testing.assert_close(derivatives(cube(once_differentiable), x, 3), 24 * x)  # 6 is missing
    with pytest.raises(RuntimeError, match="first and second derivatives, and no third one"):
        derivatives(cube(last_derivative), x, 3)


def test_results_have_no_graph_unless_one_is_asked_for():
    x = randn(3)
    (first,) = torch.autograd.grad(cube(last_derivative)(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert not second.requires_grad
