"""What would be silently wrong is refused here, or switched off with one line in the log that says so.

Every check names what was expected, what came and what to do. `tests/test_preflight.py` has a test for each.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.frozen.linear import quant_state
from meta_peft.lora.fast_weights import (
    HEADS,
    WITH_HEAD,
    FastWeights,
    active_adapter,
    head_modules,
    is_lora,
    lora_layers,
    meta_learned_adapter,
)

logger = logging.getLogger("meta_peft")
_said: set[str] = set()

BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
VARIANTS = ("NoneType", "DoraLinearVariant")
# The options of LoraConfig that have a meaning here, or that change nothing; what others would do is not known.
KNOWN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "bias", "peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "runtime_config", "megatron_core"),
}
ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)
OTHER_PROBLEMS = ("regression", "multi_label_classification")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
FUSED_ATTENTION = ("flash_attention", "flash", "flex_attention", "paged", "kernels")
# Mixtures of experts whose tokens are routed one by one, without a capacity that they would share; each is tested.
ROUTED_BY_TOKEN = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
TWICE_DIFFERENTIABLE_EXPERTS = ("eager", "batched_mm", "grouped_mm")


def check_model(model: Any, *, second_order: bool, adapter: str | None = None) -> None:
    """Raise `MetaPeftError` unless gradients through `model` will be right; switch what can be switched.

    Args:
        adapter: the name of the adapter to look at; by default the active one.
    """
    if not isinstance(model, PeftModel):
        raise MetaPeftError(
            f"Expected a PeftModel with a LoRA adapter, got {type(model).__name__}: wrap the model with"
            " peft.get_peft_model(model, LoraConfig(...))."
        )
    adapter = adapter or active_adapter(model)
    if adapter not in model.peft_config:
        raise MetaPeftError(
            f"The model has no adapter called {adapter!r}; it has {sorted(model.peft_config)}."
            f"{did_you_mean(adapter, model.peft_config)} Name one of these; one that was deleted has to be loaded again."
        )
    _check_adapter(model, adapter)
    _check_layers(model, adapter)
    _check_options(model.peft_config[adapter])
    _check_head(model, adapter)
    _check_base(model.get_base_model(), second_order=second_order)
    _check_quantised(model)


def check_learned_is_active(model: PeftModel) -> None:
    """Raise `MetaPeftError` if `model` carries a meta-learned adapter, and another one is active.

    A meta-gradient of the active one, as it is after `adapt`, would not move the start that is saved and adapted from.
    """
    learned, active = meta_learned_adapter(model), active_adapter(model)
    if learned not in (None, active):
        raise MetaPeftError(
            f"The active adapter is {active!r}, and the meta-learned one is {learned!r}: which of them is to be learned?"
            f" adapt makes the adapted one active; call model.set_adapter({learned!r}) after it, or name the adapter, with"
            f" AdapterLoss(model, adapter={learned!r}) in place of the model."
        )


def check_bare(base: nn.Module) -> None:
    """Raise `MetaPeftError` if `base` carries an adapter already, whose weights a new one of its name would replace."""
    for path, module in base.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise MetaPeftError(
                f"{path} of {type(base).__name__} belongs to an adapter that was loaded or made before: PEFT puts adapters"
                " into the base itself. Give a base of its own to each, or take the other one off first, with"
                " base = peft_model.unload()."
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


def check_autocast(device: str) -> None:
    """Raise `MetaPeftError` where torch would compute in float16, as for a base in it; say so where it is in bfloat16."""
    if not torch.is_autocast_enabled(device):
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


def other_quantisation(method: Any) -> MetaPeftError:
    """What is said of a base that another library than bitsandbytes quantised."""
    return MetaPeftError(f"The base model is quantised with {method}; only bitsandbytes 4-bit and 8-bit are supported.")


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


def _check_options(config: Any) -> None:
    """Raise if an option is set that no check before has named."""
    for option, default in _defaults().items():
        if option not in KNOWN and (value := getattr(config, option, default)) and value != default:
            raise MetaPeftError(
                f"{option}={value!r} of LoraConfig is not known here, and load would refuse an adapter that has it: leave"
                " it out."
            )


@cache
def _defaults() -> dict[str, Any]:
    return vars(LoraConfig())


def _check_layers(model: PeftModel, adapter: str) -> None:
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


def _check_head(model: PeftModel, adapter: str) -> None:
    base: Any = model.get_base_model()
    heads = list(head_modules(model, adapter))
    if type(base).__name__.endswith(CLASSIFIERS):
        if not heads or model.peft_config[adapter].task_type not in WITH_HEAD:
            raise MetaPeftError(
                f"The classification head of {type(base).__name__} is not part of the adapter, so no task could have one of"
                f" its own, or its LoraConfig does not say that it is one of a classifier, so load would refuse it: give"
                f" LoraConfig a task_type of SEQ_CLS or TOKEN_CLS. The head has to be called {' or '.join(HEADS)}."
            )
        problem, n_classes = getattr(base.config, "problem_type", None), base.config.num_labels
        if n_classes < 2 or problem in OTHER_PROBLEMS:
            raise MetaPeftError(
                f"{type(base).__name__} has num_labels={n_classes} and problem_type={problem!r}; expected two classes or"
                " more, of which each row has one. Numbers (regression) and several classes of one row have no loss here:"
                " load the base with num_labels of 2 or more and no problem_type."
            )
    elif heads:
        raise MetaPeftError(
            f"modules_to_save holds {[path for path, _ in heads]}, but {type(base).__name__} is no classifier: remove it."
        )
    elif not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise MetaPeftError(
            f"{type(base).__name__} has no language-modelling head, so it has no loss: load it with AutoModelForCausalLM,"
            " AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq or AutoModelForMaskedLM, or with a classification head."
        )


def _check_base(base: Any, *, second_order: bool) -> None:
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


def _check_quantised(model: nn.Module) -> None:
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


def check_differences(model: PeftModel) -> None:
    """Raise `MetaPeftError` unless activations are precise enough for differences of gradients."""
    coarse = {p.dtype for p in model.get_base_model().parameters()} & {torch.bfloat16, torch.float16}
    if coarse:
        raise MetaPeftError(
            f"memory='finite_differences' subtracts gradients that are nearly equal, but activations are in"
            f" {', '.join(sorted(map(str, coarse)))}: nothing but rounding would be left. Load the base in float32, or"
            " use memory='replay'."
        )
