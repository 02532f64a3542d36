"""What LoRA is put on, and whether its layers do what their config says."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import HEADS, FastWeights, is_lora, lora_layers

VARIANTS = ("NoneType", "DoraLinearVariant")
ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)


def check_layers(model: PeftModel, adapter: str) -> None:
    """Raise `MetaPeftError` unless each LoRA layer is one whose gradients are known, and that is saved as it is."""
    for path, layer in lora_layers(model, adapter):
        variant = type(layer.lora_variant.get(adapter)).__name__
        if variant not in VARIANTS:
            raise MetaPeftError(
                f"{path} uses the LoRA variant {variant.removesuffix('Variant')}, whose weights or derivatives are not"
                " known here: use plain LoRA, rsLoRA (use_rslora=True), or DoRA on linear layers (use_dora=True)."
            )
        if variant == "DoraLinearVariant" and isinstance(layer.get_base_layer(), bnb.nn.Linear8bitLt):
            raise MetaPeftError(
                f"{path} has DoRA on an 8-bit layer, whose scales PEFT's own forward loses, so that the adapter could not"
                " be used: load the base model in 4-bit or unquantised, or set use_dora=False."
            )
        check_in_use(path, layer)
        _check_scaling(path, layer, adapter, model.peft_config[adapter])
        if not isinstance(layer.get_base_layer(), ADAPTABLE):
            kind = type(layer.get_base_layer()).__name__
            raise MetaPeftError(
                f"{path} is a {kind} with LoRA; only linear layers and embeddings are supported: leave it out of"
                " target_modules."
            )
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            names = ", ".join(map(repr, module.merged_adapters))
            raise MetaPeftError(
                f"Another adapter, {names}, is merged into {path}: what is learned would fit that base, and be saved as one"
                " for the original base. Call model.unmerge_adapter() first; or keep the merged base, with"
                " merge_and_unload(), save it, and load it as a base of its own."
            )
    weights = FastWeights(model, adapter).parameters()
    held = [name for name, parameter in weights.items() if is_lora(name) and not parameter.requires_grad]
    if 0 < len(held) < sum(map(is_lora, weights)):  # all of them are those of an adapter that was loaded to be used
        raise MetaPeftError(
            f"{len(held)} LoRA matrices need no gradient ({held[0]} for one), and every one of an adapter is learned here:"
            " set requires_grad_(True), and fast_weights for what the inner loop is to move."
        )
    for name, parameter in weights.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            remedy = (
                "Keep LoRA weights in float32 (get_peft_model does, with autocast_adapter_dtype=True)."
                if is_lora(name)
                else "A head has the precision of its base: load the base with load_base, which keeps heads in float32."
            )
            raise MetaPeftError(f"{name} is in {parameter.dtype}, which swallows small inner steps. {remedy}")
        if not parameter.is_floating_point():
            raise MetaPeftError(
                f"{name} is quantised, and a head is learned whole: load the base with load_base, or give"
                f" BitsAndBytesConfig llm_int8_skip_modules={list(HEADS)}."
            )
    for path, module in model.named_modules():
        if _is_compiled(module):
            raise MetaPeftError(
                f"{path or 'The model'} is compiled; torch.compile has no second derivative. Pass the model itself, and let"
                " its layers have the forwards of their classes."
            )
        if "unsloth" in f"{type(module).__module__} {getattr(module.forward, '__module__', '')}":
            raise MetaPeftError(
                f"{path or 'The model'} is patched by Unsloth, whose kernels overwrite activations in backward. Load"
                " the model with transformers alone."
            )


def check_in_use(path: str, layer: LoraLayer) -> None:
    """Raise `MetaPeftError` if a LoRA layer is one in name alone: merged into its base, or switched off."""
    if layer.merged:
        raise MetaPeftError(f"The adapter is merged into {path}: call model.unmerge_adapter() first.")
    if layer.disable_adapters:
        raise MetaPeftError(
            f"Adapters are switched off in {path}: call this outside of model.disable_adapter(), or switch them on with"
            " model.base_model.enable_adapter_layers()."
        )


def check_still_there(model: PeftModel, adapter: str, path: str, layer: LoraLayer) -> None:
    """Raise `MetaPeftError` if a layer that had the adapter has it no more, or is none of the model's.

    PEFT takes an adapter off all of its layers, so one of them says enough.
    """
    try:
        there = model.get_submodule(path) is layer and adapter in {*layer.lora_A, *layer.lora_embedding_A}
    except AttributeError:
        there = False
    if not there:
        raise MetaPeftError(
            f"The adapter {adapter!r} is no longer in {path}: it was deleted, or taken off with unload(), after the"
            " AdapterLoss was made. Make another one, of a model that has the adapter."
        )


def _check_scaling(path: str, layer: Any, adapter: str, config: Any) -> None:
    """Raise if a layer's scale is another one than its config says, from which whoever loads the adapter has it."""
    rank, alpha, scaling = layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter]
    expected = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if not math.isclose(scaling, expected):
        raise MetaPeftError(
            f"{path} scales its adapter by {scaling:g}, and by lora_alpha and r it would be {expected:g}: set_scale and"
            " scale_layer are not saved with an adapter, so it would do something else where it is loaded. Set lora_alpha"
            " or alpha_pattern in LoraConfig."
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was given it, in place or not, or its forward."""
    forward = module.forward  # torch.compiler.disable marks what it leaves alone in the same way, and says so
    by_forward = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None or by_forward
