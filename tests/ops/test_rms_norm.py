from __future__ import annotations

import pytest
import torch
from derivatives import randn, third_derivative, up_to_second
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from meta_peft.ops.rms_norm import rms_norm

EPS = 1e-3


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_first_and_second_derivatives(shape: tuple[int, ...]):
    weight = randn(4, seed=1, grad=False)
    assert gradcheck(lambda x: rms_norm(x, weight, EPS), randn(*shape))
    assert gradgradcheck(lambda x: rms_norm(x, weight, EPS), randn(*shape))


def test_at_zero_where_eps_alone_is_under_the_root():
    weight = randn(4, seed=1, grad=False)
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rms_norm(x, weight, EPS), zero, eps=1e-5)
    assert gradgradcheck(lambda x: rms_norm(x, weight, EPS), zero, eps=1e-5)


def test_equals_torch_in_float64():
    norm = nn.RMSNorm(4, EPS, dtype=torch.float64)
    norm.weight.data = randn(4, seed=1, grad=False)
    x = randn(2, 3, 4)
    ours = up_to_second(lambda x: rms_norm(x, norm.weight.detach(), EPS), [x])
    torch.testing.assert_close(ours, up_to_second(norm, [x]), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_norm_of_transformers_in_its_precision(dtype: torch.dtype, weight_dtype: torch.dtype):
    """A wider weight, as where norms are kept in float32, widens the result."""
    norm = LlamaRMSNorm(4, EPS)
    norm.weight.data = randn(4, seed=1, grad=False).to(weight_dtype)
    x = randn(3, 4, dtype=dtype)
    ours = up_to_second(lambda x: rms_norm(x, norm.weight.detach(), norm.variance_epsilon), [x])
    expected = up_to_second(norm, [x])
    assert [t.dtype for t in ours] == [t.dtype for t in expected]
    assert torch.equal(ours[0], expected[0])
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    torch.testing.assert_close(ours, expected, rtol=10 * eps, atol=10 * eps)


def test_the_input_stays_as_it_is():
    x, weight = randn(3, 4, grad=False), randn(4, seed=1, grad=False)
    copies = x.clone(), weight.clone()
    up_to_second(lambda x: rms_norm(x, weight, EPS), [x.requires_grad_()])
    assert torch.equal(x, copies[0])
    assert torch.equal(weight, copies[1])


def test_a_third_derivative_raises():
    with pytest.raises(RuntimeError, match="no third one"):
        third_derivative(lambda x: rms_norm(x, torch.arange(1.0, 4, dtype=torch.float64), EPS), randn(3))
