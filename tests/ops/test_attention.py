from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from derivatives import noting_saved_tensors, randn, third_derivative, up_to_second
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_peft.ops.attention import attention

SCALE = 0.3
CAUSAL = torch.ones(3, 5, dtype=torch.bool).tril(2)
# The first row of the first of two sequences may look nowhere, as a padding token's.
NOWHERE = CAUSAL.expand(2, 1, 3, 5).clone()
NOWHERE[0, :, 0] = False
ZEROS = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "nowhere": NOWHERE,
    "nowhere, added": ZEROS.masked_fill(~NOWHERE, -torch.inf),
    "nowhere, almost": ZEROS.masked_fill(~NOWHERE, torch.finfo(torch.float64).min),
    "each head its own": randn(2, 4, 3, 5, seed=9, grad=False),
}


def inputs(heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three queries and five keys; values are narrower."""
    shapes = (2, heads, 3, 4), (2, kv_heads, 5, 4), (2, kv_heads, 5, 2)
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def ours(mask: Tensor | None) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, mask, SCALE)


def by_torch(mask: Tensor | None) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE, enable_gqa=True)

    return function


@pytest.mark.parametrize("mask", ["none", "nowhere", "each head its own"])
def test_first_and_second_derivatives(mask: str):
    assert gradcheck(ours(MASKS[mask]), inputs(), fast_mode=True)
    assert gradgradcheck(ours(MASKS[mask]), inputs(), fast_mode=True)


def test_every_entry_of_the_derivatives():
    few = [randn(1, 2, 2, 2), randn(1, 1, 3, 2, seed=1), randn(1, 1, 3, 1, seed=2)]
    assert gradcheck(ours(None), few)
    assert gradgradcheck(ours(None), few)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_torch(mask: str, heads: tuple[int, int]):
    found, expected = (up_to_second(f(MASKS[mask]), inputs(*heads)) for f in (ours, by_torch))
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_row_that_may_look_nowhere_is_zero():
    assert (attention(*inputs(), NOWHERE, SCALE)[0, :, 0] == 0).all()
    assert (attention(*inputs(), NOWHERE, SCALE)[1, :, 0] != 0).all()


@pytest.mark.parametrize("mask", [None, CAUSAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_in_its_precision(dtype: torch.dtype, mask: Tensor | None):
    """In bfloat16 both compute in float32 and round what comes out."""
    found, expected = (up_to_second(f(mask), inputs(dtype=dtype)) for f in (ours, by_torch))
    assert [t.dtype for t in found] == [dtype] * 7
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=20 * eps, atol=20 * eps)


def test_scores_too_large_for_an_exponential():
    q, k, v = (t.detach().mul(scale).requires_grad_() for t, scale in zip(inputs(), (1e3, 1, 1), strict=True))
    found, expected = (up_to_second(f(CAUSAL), [q, k, v]) for f in (ours, by_torch))
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_heads_inside_of_tokens_as_projections_give_them():
    q, k, v = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in inputs())

    def lying(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *rows: function(*(t.transpose(1, 2) for t in rows)).transpose(1, 2)

    found, expected = (up_to_second(lying(f(CAUSAL)), [q, k, v]) for f in (ours, by_torch))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_frozen_inputs(wanted: tuple[int, ...]):
    """As below the first adapted layer, or in it where only some projections are adapted."""

    def of_the_rest(function: Callable[..., Tensor]) -> list[Tensor]:
        given = [t.detach() for t in inputs()]

        def partly(*learned: Tensor) -> Tensor:
            arguments = dict(enumerate(given)) | dict(zip(wanted, learned, strict=True))
            # Squared: attention alone has no second derivative along values.
            return function(*(arguments[i] for i in range(3))).square()

        return up_to_second(partly, [inputs()[i] for i in wanted])

    found, expected = of_the_rest(ours(CAUSAL)), of_the_rest(by_torch(CAUSAL))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_the_inputs_stay_as_they_are():
    given, mask = inputs(), NOWHERE.clone()
    copies = [t.detach().clone() for t in given]
    up_to_second(ours(mask), given)
    assert torch.equal(mask, NOWHERE)
    assert all(torch.equal(t, copy) for t, copy in zip(given, copies, strict=True))


def test_two_tensors_of_the_size_of_the_probabilities_are_kept():
    given = [randn(1, 2, 11, 4), randn(1, 1, 13, 4, seed=1), randn(1, 1, 13, 4, seed=2)]
    with noting_saved_tensors() as saved:
        torch.autograd.grad(ours(None)(*given).sum(), given, create_graph=True)
    assert len({t.data_ptr() for t in saved if t.numel() == 2 * 11 * 13}) == 2


def test_a_third_derivative_raises():
    with pytest.raises(RuntimeError, match="no third one"):
        third_derivative(lambda x: attention(x, x, x, None, SCALE), randn(1, 1, 3, 2))
