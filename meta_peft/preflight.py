"""What would be silently wrong is refused here, or switched off with one line in the log that says so.

Every check names what was expected, what came and what to do. `tests/test_preflight.py` has a test for each.
"""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from meta_peft.errors import MetaPeftError
from meta_peft.fast_weights import active_adapter, lora_layers

logger = logging.getLogger("meta_peft")
_said: set[str] = set()

BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
FUSED_ATTENTION = ("flash_attention", "flash", "flex_attention", "paged", "kernels")


def check_model(model: Any, *, second_order: bool) -> None:
    """Raise `MetaPeftError` unless gradients through `model` will be right; switch what can be switched."""
    if not isinstance(model, PeftModel):
        raise MetaPeftError(
            f"Expected a PeftModel with a LoRA adapter, got {type(model).__name__}: wrap the model with"
            " peft.get_peft_model(model, LoraConfig(...))."
        )
    adapter = active_adapter(model)
    _check_adapter(model, adapter)
    _check_layers(model, adapter)
    _check_base(model.get_base_model(), second_order=second_order)
    _check_quantised(model)


def say_once(message: str) -> None:
    """Log `message` the first time it is given in this process."""
    if message not in _said:
        _said.add(message)
        logger.info(message)


def _check_adapter(model: PeftModel, adapter: str) -> None:
    config: Any = model.peft_config[adapter]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise MetaPeftError(f"Expected a LoRA adapter, {adapter!r} is of type {config.peft_type}: use LoraConfig.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise MetaPeftError(
            f"init_lora_weights={init!r} changes the base weights, so what is learned would not fit the original base"
            " model. Use init_lora_weights=True (the default), 'gaussian' or 'orthogonal'."
        )
    for option in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, option, None):
            raise MetaPeftError(f"{option} is set, but only LoRA matrices are meta-learned: remove it from LoraConfig.")
    if getattr(config, "lora_bias", False) or config.bias != "none":
        raise MetaPeftError("Biases are not meta-learned: set bias='none' and lora_bias=False in LoraConfig.")
    if config.lora_dropout:
        say_once(
            f"lora_dropout={config.lora_dropout} is not applied: the inner loop's loss has to be a fixed function."
        )


def _check_layers(model: PeftModel, adapter: str) -> None:
    for path, layer in lora_layers(model, adapter):
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__.removesuffix("Variant")
            raise MetaPeftError(f"{path} uses the LoRA variant {kind}; only plain LoRA and rsLoRA are supported.")
        if layer.merged:
            raise MetaPeftError(f"The adapter is merged into {path}: call model.unmerge_adapter() first.")
        for linear in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if type(linear) is not nn.Linear:
                raise MetaPeftError(f"{path} is a {type(linear).__name__} adapter; only linear layers are supported.")
            if linear.weight.dtype in (torch.float16, torch.bfloat16):
                raise MetaPeftError(
                    f"{path} has LoRA weights in {linear.weight.dtype}, which swallow small inner steps. Keep them in"
                    " float32 (get_peft_model does, with autocast_adapter_dtype=True)."
                )
    head = getattr(model.get_base_model(), "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise MetaPeftError(
                f"{path or 'The model'} is compiled; torch.compile has no second derivative. Pass the model itself."
            )
        if isinstance(module, LoraLayer) and adapter in module.lora_embedding_A:
            raise MetaPeftError(f"{path} is a LoRA adapter of an embedding; only linear layers are supported.")
        if isinstance(module, LoraLayer) and module is head:
            raise MetaPeftError(f"{path}, the output head, has a LoRA adapter: leave it out of target_modules.")
        if "unsloth" in f"{type(module).__module__} {getattr(module.forward, '__module__', '')}":
            raise MetaPeftError(
                f"{path or 'The model'} is patched by Unsloth, whose kernels overwrite activations in backward. Load"
                " the model with transformers alone."
            )


def _check_base(base: Any, *, second_order: bool) -> None:
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise MetaPeftError(
            f"{type(base).__name__} has no language-modelling head, so it has no loss: load it with AutoModelForCausalLM."
        )
    if base.config.is_encoder_decoder:
        raise MetaPeftError(f"{type(base).__name__} is an encoder-decoder; only decoder-only models are supported.")
    for attribute in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(base.config, attribute, None):
            raise MetaPeftError(
                f"{type(base).__name__} is a mixture of experts: its router would mix the rows of different tasks."
                " Use a dense model."
            )
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
    if any(p.dtype == torch.float16 for p in base.parameters()):
        raise MetaPeftError(
            "The base model is in float16, and gradient scaling does not reach the inner loop: small gradients would"
            " be lost. Load it with dtype='bfloat16' or 'float32'."
        )
    if getattr(base, "is_activation_checkpointing", False):
        say_once("Activation checkpointing is off in the inner loop: it would recompute with the wrong weights.")
    if getattr(base, "is_quantized", False) and not (
        getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    ):
        method = getattr(base.config.quantization_config, "quant_method", "unknown")
        raise MetaPeftError(
            f"The base model is quantised with {method}; only bitsandbytes 4-bit and 8-bit are supported."
        )


def _check_quantised(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        weight: Any = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise MetaPeftError(
                f"{path} was repacked for CPU inference, which rounds its weights. Load the base model anew and do not"
                " run it in evaluation mode before it is meta-trained or adapted."
            )
        # Else the first forward without gradients would repack the layer in place, and change the frozen weights.
        layer.support_avx512bf16_for_cpu = False


def check_differences(model: PeftModel) -> None:
    """Raise `MetaPeftError` unless activations are precise enough for differences of gradients."""
    coarse = {p.dtype for p in model.get_base_model().parameters()} & {torch.bfloat16, torch.float16}
    if coarse:
        raise MetaPeftError(
            f"memory='finite_differences' subtracts gradients that are nearly equal, but activations are in"
            f" {', '.join(sorted(map(str, coarse)))}: nothing but rounding would be left. Load the base in float32, or"
            " use memory='replay'."
        )
