"""A LoRA layer as one operation is what PEFT's layer computes, with its derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from derivatives import noting_saved_tensors, randn, third_derivative, up_to_second
from peft.tuners.lora import LoraLayer
from tiny_models import QUANTISED, tiny_base, with_lora
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from meta_peft.frozen.linear import dequantise
from meta_peft.ops.lora_linear import is_plain, lora_linear

IN, OUT, RANK, TASKS = 4, 5, 2, 2
# Whether A and B are a stack over tasks, a stack of one, or one matrix that all tasks share.
SHAPES = {
    "stacks": (TASKS, TASKS),
    "stacks of one": (1, 1),
    "one task": (None, None),
    "A shared": (None, TASKS),
    "B shared": (TASKS, None),
    "A shared as a stack of one": (1, TASKS),
}


def frozen(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer ``[5, 4]`` with random weights; "Conv1D" stores them transposed and always has a bias."""
    layer = Conv1D(OUT, IN) if kind == "Conv1D" else nn.Linear(IN, OUT, bias=kind == "with bias")
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = randn(*parameter.shape, seed=20 + i, grad=False)
    return layer.requires_grad_(False).to(dtype)


def matrices(shape: str, dtype: torch.dtype = torch.float64, n_in: int = IN, n_out: int = OUT) -> tuple[Tensor, Tensor]:
    of_a, of_b = (() if n is None else (n,) for n in SHAPES[shape])
    return randn(*of_a, RANK, n_in, seed=10, dtype=dtype), randn(*of_b, n_out, RANK, seed=11, dtype=dtype)


def by_hand(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """One task after the other."""
    n_tasks = max(len(m) if m.dim() == 3 else 1 for m in (a, b))

    def of(matrix: Tensor, task: int) -> Tensor:
        return matrix if matrix.dim() == 2 else matrix[task if len(matrix) > 1 else 0]

    parts = []
    for t, rows in enumerate(x.chunk(n_tasks)):
        y = rows @ weight.T + scaling * rows @ of(a, t).T @ of(b, t).T
        parts.append(y if bias is None else y + bias)
    return torch.cat(parts)


@pytest.mark.parametrize("base", ["plain", "with bias", "Conv1D"])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives(shape: str, base: str):
    layer, (a, b) = frozen(base), matrices(shape)
    inputs = (randn(4, 2, IN), a, b)
    assert gradcheck(lambda x, a, b: lora_linear(x, a, b, layer, 0.7), inputs)
    assert gradgradcheck(lambda x, a, b: lora_linear(x, a, b, layer, 0.7), inputs)


@pytest.mark.parametrize("constant", ["rows", "A", "B", "A and B"])
def test_derivatives_where_something_is_a_constant(constant: str):
    """The first adapted layer reads constant rows; slow weights may be constants for a while."""
    layer, (a, b), x = frozen("plain"), matrices("stacks"), randn(4, 2, IN)
    for tensor, name in ((x, "rows"), (a, "A"), (b, "B")):
        tensor.requires_grad_(name not in constant.split(" and "))
    assert gradcheck(lambda x, a, b: lora_linear(x, a, b, layer, 0.7), (x, a, b))
    if constant != "A and B":  # then it is linear, and the gradient a constant
        assert gradgradcheck(lambda x, a, b: lora_linear(x, a, b, layer, 0.7), (x, a, b))


@pytest.mark.parametrize("base", ["plain", "with bias", "Conv1D"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_formula_one_task_at_a_time(shape: str, base: str):
    layer, (a, b) = frozen(base), matrices(shape)
    weight = layer.weight.T if base == "Conv1D" else layer.weight
    inputs = (randn(4, 3, IN), a, b)
    ours = up_to_second(lambda x, a, b: lora_linear(x, a, b, layer, 0.7), inputs)
    expected = up_to_second(lambda x, a, b: by_hand(x, a, b, weight, layer.bias, 0.7), inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_contiguous():
    layer, (a, b), x = frozen("with bias"), matrices("stacks"), randn(3, IN, 4)
    inputs = (x, a, b)
    ours = up_to_second(lambda x, a, b: lora_linear(x.permute(2, 0, 1), a, b, layer, 0.7), inputs)
    expected = up_to_second(lambda x, a, b: by_hand(x.permute(2, 0, 1), a, b, layer.weight, layer.bias, 0.7), inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def lora_layer(model_of, name: str) -> LoraLayer:
    """An adapted layer of a model, whose base has a bias on GPT-2, and PEFT's forward of it."""
    model = model_of(name).eval()
    return next(module for path, module in model.named_modules() if isinstance(module, LoraLayer) and "1." in path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "float32", "nf4"])
def test_equals_the_forward_of_peft(model_of, name: str):
    """In evaluation mode, where PEFT applies no dropout."""
    layer = lora_layer(model_of, name)
    assert is_plain(layer, "default")
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    dtype = a.dtype
    inputs = (randn(2, 3, a.shape[1], dtype=dtype), *(m.clone().requires_grad_() for m in (a, b)))

    def of_peft(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return functional_call(layer, {"lora_A.default.weight": a, "lora_B.default.weight": b}, (x,))

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, a, b, layer.get_base_layer(), layer.scaling["default"])

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        up_to_second(ours, inputs), up_to_second(of_peft, inputs), rtol=tolerance, atol=tolerance
    )


def test_a_bfloat16_layer_with_float32_matrices_has_the_dtypes_of_peft(model_of):
    """The result is as coarse as the layer's, the gradients of A and B as fine as these are."""
    layer = lora_layer(model_of, "float32")
    layer.get_base_layer().to(torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == torch.float32
    x = randn(2, 3, a.shape[1], dtype=torch.bfloat16)
    ours = lora_linear(x, a, b, layer.get_base_layer(), layer.scaling["default"])
    of_peft = layer(x)
    assert ours.dtype == of_peft.dtype == torch.bfloat16
    torch.testing.assert_close(ours, of_peft, rtol=0.01, atol=0.01)
    for found, expected in zip(
        *(torch.autograd.grad(y.float().square().sum(), (x, a, b)) for y in (ours, of_peft)), strict=True
    ):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_layer_equals_its_dequantised_twin(model_of, name: str):
    layer = lora_layer(model_of, name).get_base_layer()
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False).double()
    dense.weight.data = dequantise(layer).double()
    inputs = (randn(4, 2, layer.in_features), *matrices("stacks", n_in=layer.in_features, n_out=layer.out_features))
    ours, expected = (
        up_to_second(lambda x, a, b, on=on: lora_linear(x, a, b, on, 0.7), inputs) for on in (layer, dense)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", QUANTISED)
def test_no_dequantised_weight_is_kept_for_a_derivative(model_of, name: str):
    """Nor by the second one, which is asked for twice, with its graph kept."""
    layer = lora_layer(model_of, name).get_base_layer()
    size = layer.in_features * layer.out_features
    inputs = (randn(4, 2, layer.in_features), *matrices("stacks", n_in=layer.in_features, n_out=layer.out_features))
    with noting_saved_tensors() as saved:
        y = lora_linear(*inputs, layer, 0.7)
        first = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
        squares = sum((g**2).sum() for g in first)
        torch.autograd.grad(squares, inputs, retain_graph=True)
        torch.autograd.grad(squares, inputs, create_graph=True)
    assert {t.numel() for t in saved if t.numel() > 1}
    assert max(t.numel() for t in saved) < size


def test_constant_rows_get_no_gradient_computed():
    """One product with the frozen weight less in each step, for the layers that come first."""
    layer, (a, b) = frozen("plain"), matrices("stacks")
    layer.weight = nn.Parameter(torch.full((OUT, IN), torch.nan, dtype=torch.float64), requires_grad=False)
    y = lora_linear(randn(4, 2, IN, grad=False), a, b, layer, 0.7)
    grads = torch.autograd.grad(y, (a, b), torch.ones_like(y), create_graph=True)
    assert all(g.isfinite().all() for g in grads)  # no product with the weight was taken
    second = torch.autograd.grad(grads[0].sum(), b)
    assert second[0].isfinite().all()


def test_a_third_derivative_raises():
    layer, (a, b) = frozen("plain"), matrices("stacks")
    x = randn(4, 2, IN, grad=False)
    with pytest.raises(RuntimeError, match="no third one"):
        third_derivative(lambda a: lora_linear(x, a, b * a.sum(), layer, 0.7), a)


# ---- which layers of PEFT are plain


def test_a_layer_with_something_of_its_own_is_not_plain(model_of):
    layer = lora_layer(model_of, "llama")
    assert is_plain(layer, "default")
    layer.lora_B["default"].bias = nn.Parameter(torch.zeros(1))
    assert not is_plain(layer, "default")


def test_a_base_of_another_class_is_not_plain(model_of):
    class Other(nn.Linear): ...

    layer = lora_layer(model_of, "llama")
    layer.get_base_layer().__class__ = Other
    assert not is_plain(layer, "default")


def test_dora_is_not_plain():
    layer = next(m for m in with_lora(tiny_base(), use_dora=True).modules() if isinstance(m, LoraLayer))
    assert not is_plain(layer, "default")


def test_an_embedding_is_not_plain():
    model = with_lora(tiny_base(), target_modules=["embed_tokens"])
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    assert not is_plain(layer, "default")


@pytest.mark.parametrize("base", ["with bias", "Conv1D"])
@pytest.mark.parametrize("shape", SHAPES)
def test_at_some_positions(shape: str, base: str):
    """The frozen product is zero elsewhere, and the derivatives are those of that."""
    layer, (a, b), x = frozen(base), matrices(shape), randn(4, 2, IN)
    at = torch.tensor([0, 1, 2, 5, 7])
    y = lora_linear(x, a, b, layer, 0.7, at=at)
    whole, adapter_alone = (lora_linear(x, a, b, on, 0.7) for on in (layer, zero(layer)))
    expected = adapter_alone.flatten(0, 1).index_copy(0, at, whole.flatten(0, 1)[at]).view_as(whole)
    torch.testing.assert_close(y, expected)
    assert gradcheck(lambda x, a, b: lora_linear(x, a, b, layer, 0.7, at=at), (x, a, b))
    assert gradgradcheck(lambda x, a, b: lora_linear(x, a, b, layer, 0.7, at=at), (x, a, b))


def zero(layer: nn.Module) -> nn.Module:
    """The same with a weight of zeros, and the bias."""
    found = copy.deepcopy(layer)
    found.weight.data.zero_()
    return found
