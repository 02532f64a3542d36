"""Which layers of a PEFT model run through `ops`, with the forwards that they get.

A layer qualifies by its exact class, since its formula has to be known; everything else runs as it is. PEFT's and
transformers' own forwards stay the reference that these are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meta_peft.frozen.linear import frozen_product, quantised_layers
from meta_peft.frozen.prefix import layers_of
from meta_peft.frozen.whole_weights import is_elsewhere, whole_weight
from meta_peft.functional.padding import TokenPositions
from meta_peft.lora.dora import dora_forwards
from meta_peft.lora.fast_weights import lora_layers
from meta_peft.ops.lora_linear import is_plain, lora_linear
from meta_peft.ops.rms_norm import rms_norm
from meta_peft.ops.swiglu import swiglu

Forwards = list[tuple[nn.Module, Callable[..., Any]]]
# transformers' classes with exactly the formulas of `ops.rms_norm` and `ops.swiglu`.
RMS_NORMS = {f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
GATED_LAYERS = {f"{name}MLP" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}

SILU = {"SiLU", "SiLUActivation"}


def fast_forwards(model: PeftModel, adapter: str, positions: TokenPositions) -> Forwards:
    """Forwards to take the place of the modules' own while losses are computed.

    Products with frozen weights are computed where `positions` says that tokens are.
    """
    return [
        *_products(model, adapter, positions),
        *_embeddings(model),
        *dora_forwards(model, adapter),
        *_norms(model),
        *_gated(model),
    ]


def _products(
    model: PeftModel, adapter: str, positions: TokenPositions
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """LoRA layers, quantised layers outside of them, and other linear layers of the base."""
    plain = [layer for _, layer in lora_layers(model, adapter) if is_plain(layer, adapter)]
    yield from ((layer, partial(_lora_layer, layer, adapter, positions)) for layer in plain)
    inside = {id(layer.get_base_layer()) for layer in plain}
    kept_elsewhere = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and is_elsewhere(m)]
    for layer in (*quantised_layers(model), *kept_elsewhere):
        if id(layer) not in inside:
            yield layer, partial(_frozen_layer, layer, positions)
    yield from ((layer, partial(_dense_layer, layer, positions)) for layer in _dense(model))


def _dense(model: PeftModel) -> Iterator[nn.Module]:
    """Linear layers in main memory, neither quantised nor with LoRA, of the base's stack of layers."""
    adapted = {id(part) for layer in model.modules() if isinstance(layer, LoraLayer) for part in layer.modules()}
    for layer in layers_of(model.get_base_model()):
        for module in layer.modules():
            if type(module) in (nn.Linear, Conv1D) and id(module) not in adapted and not is_elsewhere(module):
                own: Any = module
                if own.weight.device.type == "cpu" and not own.weight.requires_grad and "forward" not in own.__dict__:
                    yield module


def _embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Embeddings whose weight is kept elsewhere."""
    for module in model.modules():
        if type(module) is nn.Embedding and is_elsewhere(module):
            yield module, partial(_embedding, module)


def _embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, whole_weight(layer))


def _lora_layer(layer: Any, adapter: str, positions: TokenPositions, x: Tensor) -> Tensor:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return lora_linear(x, a, b, layer.get_base_layer(), layer.scaling[adapter], at=positions(x))


def _frozen_layer(layer: nn.Module, positions: TokenPositions, x: Tensor) -> Tensor:
    return frozen_product(x, layer, at=positions(x))


def _dense_layer(layer: nn.Module, positions: TokenPositions, x: Tensor) -> Tensor:
    """The layer's own forward, unless positions are left out."""
    at = positions(x)
    return type(layer).forward(layer, x) if at is None else frozen_product(x, layer, at=at)


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    for module in model.modules():
        if type(module).__name__ in RMS_NORMS:
            yield module, partial(_norm, module)


def _norm(layer: Any, x: Tensor) -> Tensor:
    """With the weight that the layer has now: a model may be moved after its forwards were chosen."""
    return rms_norm(x, whole_weight(layer), layer.variance_epsilon)


def _gated(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    for module in model.modules():
        if type(module).__name__ in GATED_LAYERS and type(getattr(module, "act_fn", None)).__name__ in SILU:
            yield module, partial(_gated_layer, module)


def _gated_layer(layer: Any, x: Tensor) -> Tensor:
    return layer.down_proj(swiglu(layer.gate_proj(x), layer.up_proj(x)))
