"""A base model without weights: every layer with its shape and its precision, on torch's meta device.

`transformers` and bitsandbytes build it as they do before they load weights, so that what is quantised, what is tied and
what stays as it is is theirs to say. The code that trains runs on it and computes shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from meta_peft.base.base_config import objective_of
from meta_peft.base.base_model import quantisation
from meta_peft.base.new_adapter import lora_config, with_adapter
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.linear import quantise_shapes, quantised_layers


def weightless_model(args: ModelArguments, config: Any) -> PeftModel:
    """What `load_base` and `with_adapter` make of `args` with a model's `config`, without values."""
    with torch.device("meta"):
        return with_adapter(_base(args, config), lora_config(args))


def _base(args: ModelArguments, config: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    if (objective := objective_of(args)) != "causal_lm":
        raise MetaPeftError(f"An estimate is made of causal language models; the objective of this one is {objective}.")
    dtype = getattr(torch, args.dtype)
    chosen: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        chosen["attn_implementation"] = args.attn_implementation
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    if (how := quantisation(args)) is not None:
        quantiser = AutoHfQuantizer.from_config(how)
        quantiser.preprocess_model(model, device_map={"": "meta"})
        quantiser.postprocess_model(model)
        for layer in quantised_layers(model):
            quantise_shapes(layer, dtype)
    return model.requires_grad_(False)
