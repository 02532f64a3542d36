"""The base: its attention, experts, precision and quantisation, and what torch computes it in."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn

from meta_peft.errors import MetaPeftError
from meta_peft.frozen.linear import quant_state
from meta_peft.utils.say_once import say_once

FUSED_ATTENTION = ("flash_attention", "flash", "flex_attention", "paged", "kernels")
# Mixtures of experts whose tokens are routed one by one, without a capacity that they would share; each is tested.
ROUTED_BY_TOKEN = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
TWICE_DIFFERENTIABLE_EXPERTS = ("eager", "batched_mm", "grouped_mm")


def check_base(base: Any, *, second_order: bool) -> None:
    """Raise `MetaPeftError` unless gradients through the base will be right; say what is switched off in it."""
    _check_experts(base, second_order=second_order)
    attention = str(getattr(base.config, "_attn_implementation", None) or "")
    if second_order and (
        attention.startswith(FUSED_ATTENTION) or "/" in attention
    ):  # a kernel from the hub has a slash
        raise MetaPeftError(
            f"attn_implementation={attention!r} has no second derivative, and would give a wrong one without an error."
            " Load the model with attn_implementation='sdpa', or use a first-order algorithm."
        )
    if second_order and attention == "sdpa":
        say_once(
            "Attention runs as ordinary matrix products in the inner loop: fused kernels have no second derivative."
        )
    if second_order and any(p.dtype == torch.bfloat16 for p in base.parameters()):
        say_once(
            "The base model is in bfloat16, in which little of a second derivative through inner Adam is exact"
            " (docs/quantised_bases.md). transformers loads a checkpoint in its own precision unless it is told"
            " dtype='float32'."
        )
    if any(p.dtype == torch.float16 for p in base.parameters()):
        raise MetaPeftError(
            "The base model is in float16, and gradient scaling does not reach the inner loop: small gradients would"
            " be lost. Load it with dtype='bfloat16' or 'float32'."
        )
    name = "is_activation_checkpointing"  # before transformers 5.23 is_gradient_checkpointing
    if getattr(base, name if hasattr(base, name) else "is_gradient_checkpointing", False):
        say_once(
            "Activation checkpointing is off in the inner loop: the model's own would recompute with the wrong weights."
            " gradient_checkpointing of MetaLoraConfig, or AdapterLoss(checkpoint=True), does it with the right ones."
        )
    if getattr(base, "is_quantized", False) and not (
        getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    ):
        method = getattr(base.config.quantization_config, "quant_method", "unknown")
        raise other_quantisation(method)


def _check_experts(base: Any, *, second_order: bool) -> None:
    if not any(getattr(base.config, n, None) for n in ("num_local_experts", "num_experts", "n_routed_experts")):
        return
    if base.config.model_type not in ROUTED_BY_TOKEN:
        raise MetaPeftError(
            f"{type(base).__name__} is a mixture of experts that is not known to route each token by itself: with limited"
            f" capacity, for one, the tokens of different tasks would compete. Use one of {sorted(ROUTED_BY_TOKEN)}, or a"
            " dense model."
        )
    experts = str(getattr(base.config, "_experts_implementation", None) or "")
    if second_order and experts not in TWICE_DIFFERENTIABLE_EXPERTS:
        raise MetaPeftError(
            f"experts_implementation={experts!r} is not known to have a second derivative. Load the model with one of"
            f" {list(TWICE_DIFFERENTIABLE_EXPERTS)}, or use a first-order algorithm."
        )


def check_quantised(model: nn.Module) -> None:
    """Raise `MetaPeftError` unless the weights of quantised layers are known and stay as they are."""
    for path, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear8bitLt) and layer.state.has_fp16_weights:
            raise MetaPeftError(
                f"{path} keeps 16-bit weights and quantises them in each forward (llm_int8_has_fp16_weight), of which no"
                " derivative is known here: load the base with load_in_8bit=True alone."
            )
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        if getattr(quant_state(layer), "packing_format_for_cpu", False):
            raise MetaPeftError(
                f"{path} was repacked for CPU inference, which rounds its weights. Load the base model anew and do not"
                " run it in evaluation mode before it is meta-trained or adapted."
            )
        # Else the first forward without gradients would repack the layer in place, and change the frozen weights.
        layer.support_avx512bf16_for_cpu = False


def other_quantisation(method: Any) -> MetaPeftError:
    """What is said of a base that another library than bitsandbytes quantised."""
    return MetaPeftError(f"The base model is quantised with {method}; only bitsandbytes 4-bit and 8-bit are supported.")


def check_differences(model: PeftModel) -> None:
    """Raise `MetaPeftError` unless activations are precise enough for differences of gradients."""
    coarse = {p.dtype for p in model.get_base_model().parameters()} & {torch.bfloat16, torch.float16}
    if coarse:
        raise MetaPeftError(
            f"memory='finite_differences' subtracts gradients that are nearly equal, but activations are in"
            f" {', '.join(sorted(map(str, coarse)))}: nothing but rounding would be left. Load the base in float32, or"
            " use memory='replay'."
        )


def check_autocast(device: str) -> None:
    """Raise `MetaPeftError` where torch would compute in float16, as for a base in it; say so where it is in bfloat16."""
    available = torch.amp.is_autocast_available(device)  # not for weights without values
    if not (available and torch.is_autocast_enabled(device)):
        return
    dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        raise MetaPeftError(
            "torch.autocast computes in float16 here, and gradient scaling does not reach the inner loop: small gradients"
            " would be lost. Call this outside of autocast, or with dtype=torch.bfloat16."
        )
    say_once(
        f"torch.autocast computes products in {dtype} here, in which little of a second derivative through inner Adam is"
        " exact (docs/quantised_bases.md). Outside of it, what is computed in is the base's own precision."
    )
