from __future__ import annotations

from collections import Counter

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from conftest import QUANTISED, plain_loss, random_rows, reference_model
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.frozen_linear import dequantise, frozen_product, frozen_products, quantised_layers


@pytest.fixture(params=QUANTISED)
def layer(request, quantised_base) -> nn.Module:
    """The ``[32, 64]`` layer of a model loaded as a user loads it."""
    return quantised_base(request.param).model.layers[0].self_attn.k_proj


def test_the_dequantised_weight_is_what_bitsandbytes_computes_with(layer: nn.Module):
    """The product of stock bitsandbytes with the identity, in training mode, is the weight."""
    weight = dequantise(layer)
    assert weight.shape == (32, 64)
    torch.testing.assert_close(layer.train()(torch.eye(64).view(1, 64, 64))[0].T, weight.float(), rtol=1e-6, atol=1e-7)
    # the state of an 8-bit layer moves at its first forward: the same weight is found again
    assert torch.equal(dequantise(layer), weight)


def test_the_weight_is_close_to_the_one_that_was_quantised(layer: nn.Module):
    exact = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.weight = bnb.nn.Params4bit(exact, quant_type="nf4", requires_grad=False).to("cpu")
        largest = 0.31 * exact.abs().max()  # half of nf4's widest gap, in units of a block's largest entry, doubled
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": exact})
        layer.to("cpu")
        largest = exact.abs().max() / 127
    error = (dequantise(layer).float() - exact).abs().max()
    assert 0 < error < largest


def test_other_layers_are_not_bitsandbytes_layers():
    with pytest.raises(TypeError, match="Linear is not a bitsandbytes layer"):
        dequantise(nn.Linear(2, 2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
def test_product_is_that_with_the_dequantised_weight(layer: nn.Module, shape: tuple[int, ...], bias: bool):
    if bias:
        layer.bias = nn.Parameter(torch.randn(32), requires_grad=False)
    x = torch.randn(shape)
    y = frozen_product(x, layer)
    assert y.shape == (*shape[:-1], 32)
    torch.testing.assert_close(y, F.linear(x, dequantise(layer).float(), layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_product_keeps_the_dtype_of_its_input(layer: nn.Module, dtype: torch.dtype):
    x = torch.randn(2, 64, dtype=dtype, requires_grad=True)
    y = frozen_product(x, layer)
    assert y.dtype == dtype
    assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


def test_derivatives_of_every_order(layer: nn.Module):
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: frozen_product(x, layer), x)
    # cubed, so that second derivatives are not zero
    assert gradgradcheck(lambda x: (frozen_product(x, layer) ** 3)[:, :4], x)


def test_layers_are_replaced_for_a_while(layer: nn.Module):
    layer.eval()
    x = torch.randn(2, 3, 64)
    stock = layer(x)
    with frozen_products([layer]):
        assert torch.equal(layer(x), frozen_product(x, layer))
    assert torch.equal(layer(x), stock)
    assert "forward" not in layer.__dict__


def saved_shapes(compute) -> Counter:
    saved: Counter = Counter()

    def pack(tensor):
        saved[tuple(sorted(tensor.shape))] += 1
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return saved


@pytest.mark.parametrize("name", QUANTISED)
def test_no_dequantised_weight_is_kept_for_backward(model_of, name: str):
    """Over a whole second-order graph: forward, inner gradient, forward with the moved weights."""
    model = model_of(name)
    loss_fn, rows = AdapterLoss(model), random_rows(n_tasks=1)
    weights = {tuple(sorted(dequantise(layer).shape)) for layer in quantised_layers(model)}
    reference = reference_model(model)

    def two_losses(loss):
        fast = {n: p.detach().unsqueeze(0).requires_grad_() for n, p in loss_fn.weights.parameters().items()}
        grads = torch.autograd.grad(loss(fast), list(fast.values()), create_graph=True)
        loss({n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)})

    ours = saved_shapes(lambda: two_losses(lambda fast: loss_fn(fast, rows).sum()))
    stock = saved_shapes(lambda: two_losses(lambda f: plain_loss(reference, {n: p[0] for n, p in f.items()}, rows)))
    assert sum(ours.values()) > 0
    assert sum(ours[shape] for shape in weights) == 0
    if name == "nf4":  # what this is for: stock bitsandbytes keeps the copies that its backward works with
        assert sum(stock[shape] for shape in weights) > 0
