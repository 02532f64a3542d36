"""The frozen base model, loaded in 4-bit, 8-bit or plain precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from meta_peft.base.base_config import objective_of
from meta_peft.base.locate import locate
from meta_peft.base.model_kinds import auto_class
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.linear import quantised_layers
from meta_peft.lora.fast_weights import HEADS
from meta_peft.lora.whole_head import keep_heads_whole, start_at_zero
from meta_peft.objectives import CLASSIFYING
from meta_peft.sharding import Sharding, asked_for, refusal


def load_base(args: ModelArguments) -> Any:
    """The base model of `args`, frozen, with the head that its objective needs."""
    objective = objective_of(args)
    sharding = asked_for()
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if (how := quantisation(args, sharding, objective)) is not None:
        options["quantization_config"] = how
    if objective in CLASSIFYING and args.num_labels is not None:
        options |= {"num_labels": args.num_labels, "ignore_mismatched_sizes": True}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if args.device_map:
        options |= _device_map(args, sharding)
    elif sharding:
        options["device_map"] = {"": "cpu"}  # each process moves its own shards to its device
    elif torch.cuda.is_available():
        from accelerate import PartialState

        options["device_map"] = {"": PartialState().device}
    where = locate(args.model_name_or_path, args.model_revision)
    try:
        model, found = auto_class(objective).from_pretrained(
            where,
            output_loading_info=True,
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
            use_safetensors=True,  # weights in other files are pickles
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise MetaPeftError(f"The base model {args.model_name_or_path!r} cannot be loaded: {error}") from error
    absent = _absent_parts(model, found)
    _check_complete(model, objective, absent)
    if args.load_in_4bit + args.load_in_8bit and not quantised_layers(model):
        raise MetaPeftError("The base was loaded without quantisation, though it was asked for: leave device_map out.")
    keep_heads_whole(model)
    if absent and args.new_head == "zero":  # what is absent is a head, or it would have been refused
        start_at_zero(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.name_or_path = args.model_name_or_path  # what adapters name as their base: never a cache folder
    return model


def _absent_parts(model: Any, found: dict[str, Any]) -> set[str]:
    """The weights that the checkpoint has not, or has in another shape."""
    absent = [*found["missing_keys"], *(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])]
    return {name for name, _ in model.named_parameters()} & set(absent)


def _check_complete(model: Any, objective: str, absent: set[str]) -> None:
    """Raise if frozen weights start at random: the next one who loads the base would have others."""
    parts = absent
    if objective in CLASSIFYING:  # the head is learned, and saved with the adapter
        parts = {name for name in parts if not name.split(".")[0].endswith(HEADS)}
    if parts:
        raise MetaPeftError(
            f"The checkpoint of the base has no weights for {len(parts)} parts of {type(model).__name__}"
            f" ({sorted(parts)[0]!r} for one), which would be random, and others for each who loads it. Choose a base that"
            f" was trained for {objective}, or another objective; or load the model, train or initialise these parts,"
            " and save it with save_pretrained."
        )


def _device_map(args: ModelArguments, sharding: Sharding | None) -> dict[str, Any]:
    """Options of `from_pretrained` that keep part of the base in main memory or on disk."""
    if sharding:
        raise MetaPeftError(
            f"device_map is for one process, and the launcher asks for {sharding.back_end}: leave it out."
        )
    devices: Any = "auto" if args.device_map == "auto" else json.loads(Path(str(args.device_map)).read_text())
    if isinstance(devices, dict):
        computing = set(devices.values()) - {"cpu", "disk"}
        if len(computing) > 1:
            raise MetaPeftError(
                f"device_map names {sorted(map(str, computing))}, and the weights of one adapter have to lie on one"
                " device: name one, cpu and disk, or shard over processes (docs/scaling.md)."
            )
        if (args.load_in_4bit or args.load_in_8bit) and {"cpu", "disk"} & set(devices.values()):
            check = refusal("device_map", "4-bit" if args.load_in_4bit else "8-bit", "first order")
            raise MetaPeftError(f"device_map with a quantised base is refused: {check}.")
    return {"device_map": devices, "offload_folder": args.offload_folder}


def quantisation(args: ModelArguments, sharding: Sharding | None = None, objective: str = "causal_lm") -> Any:
    """How `args` quantise the base: a `BitsAndBytesConfig`, or None. A classification head is left whole: it is learned."""
    from transformers import BitsAndBytesConfig

    whole = {"llm_int8_skip_modules": list(HEADS)} if objective in CLASSIFYING else {}
    if args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=getattr(torch, args.dtype),
            bnb_4bit_quant_storage=_quant_storage(args, sharding),
            **whole,
        )
    return BitsAndBytesConfig(load_in_8bit=True, **whole) if args.load_in_8bit else None


def _quant_storage(args: ModelArguments, sharding: Sharding | None) -> str:
    """FSDP2 shards floats only, and those of one dtype together."""
    fsdp2 = sharding is not None and sharding.back_end == "fsdp2"
    storage = args.bnb_4bit_quant_storage or (args.dtype if fsdp2 else "uint8")
    if fsdp2 and storage != args.dtype:
        raise MetaPeftError(
            f"bnb_4bit_quant_storage={storage} with dtype={args.dtype} would not shard under FSDP2: leave it out."
        )
    return storage
