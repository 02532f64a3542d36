"""What a LoraConfig asks for that would not be meta-learned, or not be found again by `load`."""

from __future__ import annotations

from functools import cache
from typing import Any

from peft import LoraConfig

from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import HEADS
from meta_peft.utils.say_once import say_once

BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
# The options of LoraConfig that have a meaning here, or that change nothing; what others would do is not known.
KNOWN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "bias", "peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "runtime_config", "megatron_core"),
}


def check_config(config: Any, adapter: str) -> None:
    """Raise `MetaPeftError` unless an adapter with this config is one of LoRA matrices that can all be learned."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise MetaPeftError(f"Expected a LoRA adapter, {adapter!r} is of type {config.peft_type}: use LoraConfig.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise MetaPeftError(
            f"init_lora_weights={init!r} changes the base weights, so what is learned would not fit the original base"
            " model. Use init_lora_weights=True (the default), 'gaussian' or 'orthogonal'."
        )
    others = [name for name in config.modules_to_save or () if name not in HEADS]
    for option, found in (("modules_to_save", others), ("trainable_token_indices", config.trainable_token_indices)):
        if found:
            raise MetaPeftError(
                f"{option} is set, but only LoRA matrices are meta-learned: remove it from LoraConfig. Of modules_to_save,"
                f" the classification heads {' and '.join(HEADS)} may stay."
            )
    if getattr(config, "target_parameters", None):
        raise MetaPeftError(
            f"target_parameters={sorted(config.target_parameters)} adapts bare parameters, such as the experts and routers"
            " that PEFT turns target_modules='all-linear' into; only linear layers and embeddings are supported: name"
            " those to adapt in target_modules."
        )
    if getattr(config, "layer_replication", None):
        raise MetaPeftError(
            "layer_replication makes another base model of the base, which load would not find again: leave it out."
        )
    if getattr(config, "ensure_weight_tying", False):
        raise MetaPeftError(
            "ensure_weight_tying lets two layers share their LoRA matrices, which would be adapted as if they did not:"
            " leave it out of LoraConfig, or leave the embedding out of target_modules."
        )
    if getattr(config, "lora_bias", False) or config.bias != "none":
        raise MetaPeftError("Biases are not meta-learned: set bias='none' and lora_bias=False in LoraConfig.")
    if config.lora_dropout:
        say_once(
            f"lora_dropout={config.lora_dropout} is not applied: the inner loop's loss has to be a fixed function."
        )


def check_options(config: Any) -> None:
    """Raise `MetaPeftError` if an option is set that no check before has named."""
    for option, default in _defaults().items():
        if option not in KNOWN and (value := getattr(config, option, default)) and value != default:
            raise MetaPeftError(
                f"{option}={value!r} of LoraConfig is not known here, and load would refuse an adapter that has it: leave"
                " it out."
            )


@cache
def _defaults() -> dict[str, Any]:
    return vars(LoraConfig())
