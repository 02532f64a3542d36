"""A new adapter on a base model: LoRA where the options say, and a head if the objective needs one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers.pytorch_utils import Conv1D

from meta_peft import preflight
from meta_peft.base.base_config import lacks_classes, objective_of
from meta_peft.base.base_model import load_base
from meta_peft.base.model_kinds import KINDS
from meta_peft.config import ModelArguments
from meta_peft.config.model_arguments import DEFAULT_TARGETS
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.whole_weights import whole_weight
from meta_peft.lora.fast_weights import HEADS, lora_layers
from meta_peft.objectives import CLASSIFYING, objective_name


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
        revision=args.model_revision,  # whoever loads the adapter gets the base that it was learned on
    )


def with_adapter(base: Any, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with an error that names the layers there are if a target or a layer's number matches none."""
    preflight.check_bare(base)
    _check_all_match(base, config)
    try:
        model: Any = get_peft_model(base, config)
    except ValueError as error:
        if "target_modules" not in str(error).lower() and "target modules" not in str(error).lower():
            raise
        targets = (
            config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
        )
        raise MetaPeftError(
            f"lora_target_modules={targets} with lora_layers={config.layers_to_transform} match"
            f" no layer of {_layers_there_are(base)}."
        ) from error
    if config.modules_to_save:  # PEFT adds the names of heads to those that are there
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    _materialise(model, config)
    return model


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


def _check_all_match(base: Any, config: LoraConfig) -> None:
    """Raise if a target or a layer's number matches nothing while others do, of which PEFT says no word.

    A regular expression, or a word for several targets, is one target. What matches nothing at all is left to PEFT, and of
    the targets that are there by default some are enough.
    """
    if config.target_modules is None or isinstance(config.target_modules, str):
        return
    layers = config.layers_to_transform
    numbers = [layers] if isinstance(layers, int) else list(layers or ())
    found = [path for path, _ in base.named_modules() if path and check_target_module_exists(config, path)]
    by_default = set(config.target_modules) == set(DEFAULT_TARGETS)  # nobody chose them for this base
    named = () if by_default else config.target_modules
    targets = sorted(t for t in named if not any(f".{path}".endswith(f".{t}") for path in found))
    unknown = [n for n in numbers if not any(_is_in_layer(path, n, config) for path in found)]
    if not found or not (targets or unknown):
        return
    wrong = [f"lora_target_modules={targets}" + (f" with lora_layers={numbers}" if numbers else "")] if targets else []
    wrong += [f"lora_layers={unknown}"] if unknown else []
    raise MetaPeftError(
        f"{' and '.join(wrong)} match no layer of {_layers_there_are(base)}: correct what is misspelt, or leave it out."
    )


def _is_in_layer(path: str, number: int, config: LoraConfig) -> bool:
    """Whether PEFT takes `path` for a part of this layer. Of a target that is a whole path it does not ask."""
    alone = copy.copy(config)
    alone.target_modules, alone.layers_to_transform = {path.rpartition(".")[2]}, [number]
    return bool(check_target_module_exists(alone, path))


def _layers_there_are(base: Any) -> str:
    linear = (torch.nn.Linear, Conv1D)
    names = sorted({path.rsplit(".", 1)[-1] for path, m in base.named_modules() if isinstance(m, linear)})
    n_layers = getattr(base.config, "num_hidden_layers", "?")
    return f"{type(base).__name__}, whose linear layers are called {names} in layers 0 to {n_layers} - 1"
