"""The product with a frozen weight, whose derivatives of every order save no copy of that weight.

``y = x W^T`` is linear in x, so its backward is ``dx = g W``, the same product with the other orientation, and the
backward of that is the first again. Written as one autograd Function that calls itself, a dequantised weight lives only
while a product is computed. bitsandbytes' own backward hands a dequantised copy to autograd instead, which a
second-order graph then keeps for every layer and inner step.

8-bit layers are computed with weights only quantised (activations are not), in training and evaluation mode alike, so
that what is differentiated is what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meta_peft.frozen.whole_weights import whole_weight

FOUR_BIT, EIGHT_BIT = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
QUANTISED = (FOUR_BIT, EIGHT_BIT)
COPY = "_dense_copy_of_weight"  # where a layer holds it


def dequantise(layer: nn.Module) -> Tensor:
    """The weight of a `Linear4bit` or `Linear8bitLt` as a dense tensor ``[out, in]``."""
    if isinstance(layer, bnb.nn.Linear4bit):
        dense: Tensor = bnb.functional.dequantize_4bit(whole_weight(layer).view(-1, 1), quant_state(layer))
        return dense
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes = layer.weight.CB if layer.weight.CB is not None else layer.state.CB
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return codes.to(scales.dtype) * (scales.unsqueeze(1) / 127.0)
    raise TypeError(f"{type(layer).__name__} is not a bitsandbytes layer")


def quant_state(layer: nn.Module) -> Any:
    """The scales of a `Linear4bit`. What shards a weight makes another parameter of it, which does not carry them."""
    own: Any = layer
    return getattr(own.weight, "quant_state", None) or own.quant_state


def quantise_shapes(layer: Any, dtype: torch.dtype) -> None:
    """Give a bitsandbytes layer on the meta device codes and scales of the sizes that a weight in `dtype` would get."""
    with torch.device("cpu"):  # a table that bitsandbytes makes at its first use and keeps: it has to have values
        bnb.functional.quantize_blockwise(torch.zeros(1))
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    dense = torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(layer, bnb.nn.Linear4bit):
        kind = {"quant_type": weight.quant_type, "compress_statistics": weight.compress_statistics}
        with torch.device("cpu"):
            codes, state = bnb.functional.quantize_4bit(dense, quant_storage=weight.quant_storage, **kind)
        layer.weight = bnb.nn.Params4bit(codes, False, state, bnb_quantized=True, **kind)
    else:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(
            dense.half()
        )  # as bitsandbytes does, whatever the dtype
        layer.weight = bnb.nn.Int8Params(codes, False, CB=codes, SCB=scales)


def scale_bytes(layer: Any) -> int:
    """Bytes of a quantised layer's scales, which are no parameters: they come on top of its codes."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return int(layer.weight.SCB.nbytes)
    state = quant_state(layer)
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum(int(tensor.nbytes) for tensor in (state.absmax, state.code, *nested))


@contextmanager
def dense_copies(layers: Iterable[nn.Module], n_bytes: float) -> Iterator[None]:
    """Inside this context a dequantised copy of a layer's weight is kept from its first use on, up to `n_bytes` in all.

    Every layer takes part in every pass, and dequantising costs most per weight where there are few: the smallest
    layers come first. Inside another such context, what that one keeps stays as it is.
    """
    chosen: list[nn.Module] = []
    for layer in sorted((layer for layer in layers if COPY not in layer.__dict__), key=_dense_bytes):
        n_bytes -= _dense_bytes(layer)
        if n_bytes < 0:
            break
        chosen.append(layer)
    for layer in chosen:
        layer.__dict__[COPY] = None
    try:
        yield
    finally:
        for layer in chosen:
            del layer.__dict__[COPY]


def _dense_bytes(layer: Any) -> int:
    return 4 * int(layer.in_features) * int(layer.out_features)


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a frozen linear layer, quantised or not, as ``[out, in]`` in `dtype`, detached."""
    if not isinstance(layer, QUANTISED):
        weight = whole_weight(layer)
        return (weight.T if isinstance(layer, Conv1D) else weight).to(dtype)
    if COPY not in layer.__dict__:
        return dequantise(layer).to(dtype)
    copy: Tensor | None = layer.__dict__[COPY]
    if copy is None or copy.dtype != dtype:
        layer.__dict__[COPY] = copy = dequantise(layer).to(dtype)
    return copy


def frozen_bias(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    bias: Any = layer.bias
    return None if bias is None else bias.detach().to(dtype)


def times_frozen(x: Tensor, layer: nn.Module, *, transposed: bool = False, at: Tensor | None = None) -> Tensor:
    """``x W^T``, or ``x W`` if `transposed`, as plain numbers without a graph; x is ``[..., features]``.

    `at` has the rows of x to compute, counted over all its other dimensions; the others are zero in the result.
    """
    weight = frozen_weight(layer, x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # one large product: a batched one would read the weight once per row
    some = rows if at is None else rows[at]
    y = some @ weight if transposed else F.linear(some, weight)
    if at is not None:
        y = y.new_zeros(len(rows), y.shape[-1]).index_copy_(0, at, y)
    # No view of a tensor that an autograd Function made: torch lets nobody write into such a one, and some models do.
    result: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return result


class _FrozenProduct(torch.autograd.Function):
    """``x W^T``, or ``x W`` if `transposed`, for the frozen weight W of `layer`, at some rows (see `times_frozen`)."""

    @staticmethod
    def forward(x: Tensor, layer: nn.Module, transposed: bool, at: Tensor | None) -> Tensor:
        return times_frozen(x, layer, transposed=transposed, at=at)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layer, ctx.transposed, ctx.at = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _FrozenProduct.apply(grads[0], ctx.layer, not ctx.transposed, ctx.at), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _FrozenProduct.apply(tangents[0], ctx.layer, ctx.transposed, ctx.at)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, layer: nn.Module, transposed: bool, at: Tensor | None
    ) -> tuple[Tensor, int]:
        # The product acts on the last dimension alone, so one more in front changes nothing but how rows are counted.
        if at is not None:
            first = torch.arange(info.batch_size, device=at.device) * (x.numel() // (info.batch_size * x.shape[-1]))
            at = (first[:, None] + at).flatten()
        return _FrozenProduct.apply(x.movedim(in_dims[0], 0), layer, transposed, at), 0


def frozen_product(x: Tensor, layer: nn.Module, *, with_bias: bool = True, at: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a frozen linear layer; x is ``[..., in]``, the result ``[..., out]``. Serves `torch.func` too.

    Where not all rows are needed, `at` has those that are (see `times_frozen`).
    """
    y: Tensor = _FrozenProduct.apply(x, layer, False, at)
    bias = frozen_bias(layer, y.dtype) if with_bias else None
    return y if bias is None else y + bias


def quantised_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, QUANTISED)]
