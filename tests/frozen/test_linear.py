from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from derivatives import noting_saved_tensors, randn, third_derivative, up_to_second
from tiny_models import QUANTISED, plain_loss, random_rows, reference_model
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.pytorch_utils import Conv1D

from meta_peft.frozen.linear import (
    COPY,
    dense_copies,
    dequantise,
    frozen_product,
    frozen_weight,
    quantised_layers,
)
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.utils.forwards import replaced_forwards


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


def test_a_model_may_write_into_a_product():
    """Longformer scales its queries in place: torch forbids it for a view of what an autograd Function made."""
    layer, x = nn.Linear(4, 5, dtype=torch.float64).requires_grad_(False), randn(2, 3, 4, seed=0)

    def scaled(product: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = product(x)
        y /= 3
        return y.square()

    found, expected = (partial(scaled, product) for product in (lambda x: frozen_product(x, layer), layer))
    for one, other in zip(up_to_second(found, [x]), up_to_second(expected, [x]), strict=True):
        torch.testing.assert_close(one, other)


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


def test_product_at_some_rows(layer: nn.Module):
    """Zero at others; of first, second and forward-mode derivatives as well, also of many vectors at once."""
    layer.bias = None
    at, x = torch.tensor([0, 3, 4]), randn(2, 3, 64)
    some = torch.zeros(6, 1, dtype=torch.float64).index_fill(0, at, 1.0).view(2, 3, 1)
    torch.testing.assert_close(frozen_product(x, layer, at=at), some * frozen_product(x, layer))
    assert gradcheck(
        lambda x: frozen_product(x, layer, at=at)[..., :3], x, check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(lambda x: (frozen_product(x, layer, at=at) ** 3)[..., :3], x)


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


KINDS = ["dense", "Conv1D", *QUANTISED]


def frozen(kind: str, quantised_base) -> nn.Module:
    """A layer ``[32, 64]`` with a bias: float64, or quantised."""
    if kind in QUANTISED:
        layer = quantised_base(kind).model.layers[0].self_attn.k_proj
    else:
        layer = (nn.Linear(64, 32) if kind == "dense" else Conv1D(32, 64)).double()
        layer.weight.data = randn(*layer.weight.shape, seed=5, grad=False) / 8
    layer.bias = nn.Parameter(randn(32, seed=6, grad=False))
    return layer.requires_grad_(False)


def dense_copy(layer: nn.Module) -> nn.Linear:
    twin = nn.Linear(64, 32, dtype=torch.float64).requires_grad_(False)
    stored = {nn.Linear: lambda: layer.weight, Conv1D: lambda: layer.weight.T}.get(
        type(layer), lambda: dequantise(layer)
    )
    twin.weight.data = stored().double()
    twin.bias.data = layer.bias.detach()
    return twin


@pytest.fixture(params=KINDS)
def twins(request, quantised_base) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """`frozen_product` with a layer of each kind, and the ordinary forward of a dense layer with the same weight."""
    layer = frozen(request.param, quantised_base)
    return partial(frozen_product, layer=layer), dense_copy(layer)


@pytest.mark.parametrize("kind", ["dense", "Conv1D"])
def test_dense_layers_have_derivatives_of_every_order(kind: str):
    layer = (nn.Linear(4, 3) if kind == "dense" else Conv1D(3, 4)).double().requires_grad_(False)
    x = randn(2, 2, 4)
    assert gradcheck(lambda x: frozen_product(x, layer), x)
    assert gradgradcheck(lambda x: frozen_product(x, layer) ** 3, x)
    assert gradcheck(lambda x: frozen_product(x, layer), x, check_forward_ad=True, check_batched_grad=True)


def test_equals_the_dense_layer_up_to_the_second_derivative(twins):
    ours, dense = twins
    for shape in ((64,), (3, 64), (2, 3, 64)):
        found, expected = (up_to_second(lambda x, f=f: f(x) ** 3, [randn(*shape)]) for f in (ours, dense))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_layer_has_a_third_derivative_of_its_own_to_lose(twins):
    """The product is linear, so its derivatives of every order come from itself."""
    found, expected = (third_derivative(lambda x, f=f: f(x) ** 4, randn(2, 64)) for f in twins)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def squared_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    gradient = torch.func.grad(function)
    return lambda x: (gradient(x) ** 2).sum()


def test_torch_func_grad(twins):
    ours, dense = twins
    x = randn(2, 3, 64, grad=False)
    for nested in (1, 2):
        functions = [lambda x, f=f: (f(x) ** 3).sum() for f in (ours, dense)]
        for _ in range(nested):
            functions = [squared_gradient(f) for f in functions]
        torch.testing.assert_close(*(f(x) for f in functions), rtol=1e-11, atol=0)


def test_torch_func_vmap(twins):
    """Over the first dimension, over one in the middle, over two, and under a gradient."""
    ours, dense = twins
    x = randn(4, 2, 3, 64, grad=False)
    for in_dims in (0, 1, 2):
        found, expected = (torch.func.vmap(f, in_dims)(x) for f in (ours, dense))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found, expected = (torch.func.vmap(torch.func.vmap(f, 1), 2)(x) for f in (ours, dense))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found, expected = (torch.func.vmap(torch.func.grad(lambda x, f=f: (f(x) ** 3).sum()))(x) for f in (ours, dense))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_torch_func_jvp(twins):
    """Forward mode, alone, over a gradient (a product with a Hessian), and for many directions at once."""
    ours, dense = twins
    x, direction = randn(2, 64, grad=False), randn(2, 64, seed=1, grad=False)
    cubes = [lambda x, f=f: f(x) ** 3 for f in (ours, dense)]
    found, expected = (torch.func.jvp(f, (x,), (direction,)) for f in cubes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.func.grad(lambda x, f=f: f(x).sum()) for f in cubes]
    found, expected = (torch.func.jvp(g, (x,), (direction,)) for g in grads)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    many = randn(5, 2, 64, seed=2, grad=False)
    found, expected = (torch.func.vmap(lambda d, f=f: torch.func.jvp(f, (x,), (d,))[1])(many) for f in cubes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_layers_are_replaced_for_a_while(layer: nn.Module):
    layer.eval()
    x = torch.randn(2, 3, 64)
    stock = layer(x)
    with replaced_forwards([(layer, partial(frozen_product, layer=layer))]):
        assert torch.equal(layer(x), frozen_product(x, layer))
    assert torch.equal(layer(x), stock)
    assert "forward" not in layer.__dict__


def saved_shapes(compute) -> Counter:
    with noting_saved_tensors() as saved:
        compute()
    return Counter(tuple(sorted(tensor.shape)) for tensor in saved)


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


@pytest.mark.parametrize("kind", QUANTISED)
def test_dense_copies_change_no_product_and_are_gone_afterwards(quantised_base, kind: str):
    layers = quantised_layers(quantised_base(kind))
    x = torch.randn(3, layers[0].in_features)
    plain = frozen_product(x, layers[0])
    attributes = set(layers[0].__dict__)
    with dense_copies(layers, math.inf):
        assert torch.equal(frozen_product(x, layers[0]), plain)
        first = frozen_weight(layers[0], torch.float32)
        assert frozen_weight(layers[0], torch.float32) is first
        assert frozen_weight(layers[0], torch.float64).dtype == torch.float64
    assert set(layers[0].__dict__) == attributes
    assert frozen_weight(layers[0], torch.float32) is not first


def test_dense_copies_of_the_smallest_layers_come_first_and_stay_within_the_budget(quantised_base):
    layers = quantised_layers(quantised_base("nf4"))
    sizes = sorted(4 * layer.in_features * layer.out_features for layer in layers)
    assert sizes[0] < sizes[-1]

    def kept(n_bytes: float) -> list[int]:
        with dense_copies(layers, n_bytes):
            return sorted(4 * la.in_features * la.out_features for la in layers if COPY in la.__dict__)

    assert kept(0) == []
    assert kept(sizes[0]) == sizes[:1]
    assert kept(sum(sizes) - 1) == sizes[:-1]
    assert kept(sum(sizes)) == sizes


def test_a_context_inside_another_leaves_the_copies_of_the_outer_one(quantised_base):
    layers = quantised_layers(quantised_base("nf4"))
    with dense_copies(layers, math.inf):
        first = frozen_weight(layers[0], torch.float32)
        with dense_copies(layers, math.inf):
            assert frozen_weight(layers[0], torch.float32) is first
        assert frozen_weight(layers[0], torch.float32) is first
    assert not any(COPY in layer.__dict__ for layer in layers)
