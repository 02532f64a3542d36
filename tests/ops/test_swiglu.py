from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from derivatives import randn, third_derivative, up_to_second
from torch.autograd import gradcheck, gradgradcheck
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from meta_peft.ops import swiglu as module
from meta_peft.ops.swiglu import swiglu


def by_torch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(a) * b


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_first_and_second_derivatives(shape: tuple[int, ...]):
    inputs = (randn(*shape), randn(*shape, seed=1))
    assert gradcheck(swiglu, inputs)
    assert gradgradcheck(swiglu, inputs)


@pytest.mark.parametrize("a", [-40.0, -1e-3, 0.0, 1e-3, 40.0])
def test_far_from_zero_and_at_it(a: float):
    inputs = (torch.tensor([a], dtype=torch.float64, requires_grad=True), randn(1))
    torch.testing.assert_close(up_to_second(swiglu, inputs), up_to_second(by_torch, inputs), rtol=1e-12, atol=1e-15)


def test_equals_torch_on_rows_that_are_not_contiguous():
    """Halves of one tensor, as a fused projection would give them, and a transposed one."""
    both = randn(2, 3, 8)
    for make in (lambda t: t.chunk(2, -1), lambda t: (t[..., :4].transpose(0, 1), t[..., 4:].transpose(0, 1))):
        of_torch, ours = (up_to_second(lambda t, f=f, make=make: f(*make(t)), [both]) for f in (by_torch, swiglu))
        torch.testing.assert_close(ours, of_torch, rtol=1e-13, atol=1e-15)


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    """Seven rows at once, and in blocks of two with one row left."""
    inputs = (randn(7, 4), randn(7, 4, seed=1))
    whole = up_to_second(swiglu, inputs)
    monkeypatch.setattr(module, "BLOCK", 8)
    torch.testing.assert_close(up_to_second(swiglu, inputs), whole, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_gate_of_transformers_in_its_precision(dtype: torch.dtype):
    layer = LlamaMLP(LlamaConfig(hidden_size=4, intermediate_size=6, num_attention_heads=1)).to(dtype)
    x = randn(3, 4, dtype=dtype)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return layer.down_proj(swiglu(layer.gate_proj(x), layer.up_proj(x)))

    found, expected = up_to_second(ours, [x]), up_to_second(layer, [x])
    assert [t.dtype for t in found] == [t.dtype for t in expected] == [dtype] * 3
    assert torch.equal(found[0], expected[0])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=20 * eps, atol=20 * eps)


def test_a_third_derivative_raises():
    with pytest.raises(RuntimeError, match="no third one"):
        third_derivative(lambda x: swiglu(x, x), randn(3))
