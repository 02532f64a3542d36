"""A base model without weights: every layer with its shape and its precision, on torch's meta device.

`transformers` and bitsandbytes build it as they do before they load weights, so that what is quantised, what is tied and
what stays as it is is theirs to say. The code that trains runs on it and computes shapes alone. `check_estimated` says of
which models that tells what they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel

from meta_peft import preflight
from meta_peft.base.base_config import objective_of
from meta_peft.base.base_model import quantisation
from meta_peft.base.new_adapter import lora_config, with_adapter
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.linear import quantise_shapes, quantised_layers

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def weightless_model(args: ModelArguments, config: Any) -> PeftModel:
    """What `load_base` and `with_adapter` make of `args` with a model's `config`, without values."""
    with torch.device("meta"):
        return with_adapter(_base(args, config), lora_config(args))


def check_estimated(args: ModelArguments, config: Any) -> None:
    """Raise `MetaPeftError` for a model whose shapes alone do not tell what it takes, or that is not trained here."""
    for is_so, what in _not_estimated(args, config):
        if is_so:
            raise MetaPeftError(
                "An estimate is made of dense causal language models of text whose layers have attention;"
                f" {args.model_name_or_path!r} {what}. Where meta-peft train takes it, measure one step (max_steps: 1)."
            )
    stored = _stored_quantisation(config)
    if stored and not (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        raise preflight.other_quantisation(stored.get("quant_method", "unknown"))


def _not_estimated(args: ModelArguments, config: Any) -> Iterator[tuple[Any, str]]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    objective, kind = objective_of(args), config.model_type
    yield objective != "causal_lm", f"has the objective {objective}"
    yield not hasattr(config, "num_hidden_layers"), f"({kind}) is made of several models"
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    yield not remote and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, f"({kind}) is none of those of transformers"
    experts = [name for name, value in config.to_dict().items() if name.endswith("_experts") and value]
    yield experts, f"({kind}) is a mixture of experts, which are chosen by values"
    kinds = set(getattr(config, "layer_types", None) or ())
    yield kinds - ATTENTION or not hasattr(config, "num_attention_heads"), f"({kind}) has other layers"


def _stored_quantisation(config: Any) -> dict[str, Any]:
    """How the weights of the checkpoint are quantised; empty if they are not."""
    return getattr(config, "quantization_config", None) or {}


def _base(args: ModelArguments, config: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    check_estimated(args, config)
    stored = _stored_quantisation(config)  # such a checkpoint is loaded as it is, whatever is asked for
    dtype = (stored and config.dtype) or getattr(torch, args.dtype)
    chosen: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        chosen["attn_implementation"] = args.attn_implementation
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    if how := stored or quantisation(args):
        quantiser = AutoHfQuantizer.from_config(how)
        quantiser.preprocess_model(model, device_map={"": "meta"})
        quantiser.postprocess_model(model)
        for layer in quantised_layers(model):
            quantise_shapes(layer, dtype)
    return model.requires_grad_(False)
