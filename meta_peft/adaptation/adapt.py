"""What a user calls: support examples in, adapted PEFT adapters out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from meta_peft.adaptation.stacks import Adapted, Examples, adapted_stacks, check_hold_back, encoded_support
from meta_peft.adapters import hub
from meta_peft.adapters.adapter_files import TEXTS
from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.tasks.sources import rows_of_task
from meta_peft.utils.checked import shown

# What PEFT or a file changes of a config without another result.
NOT_OF_THE_PLACEMENT = (*TEXTS, "inference_mode", "modules_to_save", "auto_mapping")


def adapt(
    model: PeftModel, support: Examples, *, steps: int | None = None, hold_back: float = 0.0, name: str = "adapted"
) -> tuple[PeftModel, dict[str, float]]:
    """Adapt to one task: `model` with a new active adapter called `name`, and the metrics of `Adapted`.

    The meta-learned adapter stays as it is, so the next call starts from it again; a `name` used before is overwritten.

    Args:
        model: from `meta_peft.load`, or trained by `MetaTrainer`.
        support: a handful of rows, in any form that the model's objective reads; or as they were in training, which renamed
            columns or made pairs of translations.
        steps: gradient steps; by default as many as in meta-training.
        hold_back: see `adapt_many`.
        name: of the new adapter.

    Raises:
        MetaPeftError: the model carries no meta-learned adapter, a row cannot be read, or `name` cannot be one.
    """
    learned = hub.meta_learned(model)
    if not isinstance(name, str):
        raise MetaPeftError(f"name must be a text, what the new adapter is to be called; got {shown(name)}.")
    if name in ("", learned.adapter) or "." in name:
        raise MetaPeftError(f"name={name!r} is empty, taken by the meta-learned adapter or has a dot: choose another.")
    if hasattr(nn.ModuleDict, name):
        raise MetaPeftError(f"name={name!r} is taken by torch, which keeps adapters in a ModuleDict: choose another.")
    result = adapt_many(model, {name: support}, steps=steps, hold_back=hold_back)[name]
    if name not in model.peft_config:
        model.add_adapter(name, copy.deepcopy(result.config))  # PEFT changes its list of heads
    elif _placement(model.peft_config[name]) != _placement(result.config):
        raise MetaPeftError(
            f"The model has an adapter {name!r} already, with another LoRA config than the meta-learned one: choose another"
            " name, or remove it with model.delete_adapter."
        )
    FastWeights(model, name).load_(result.weights)
    model.set_adapter(name)
    return model, result.metrics


def _placement(config: Any) -> dict[str, Any]:
    """Where an adapter's matrices are and what they are multiplied by."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_OF_THE_PLACEMENT}


def adapt_many(
    model: PeftModel,
    tasks: Mapping[str, Examples],
    *,
    steps: int | None = None,
    hold_back: float = 0.0,
    tasks_per_forward: int = 8,
    progress: Callable[[int], object] = lambda tasks: None,
) -> dict[str, Adapted]:
    """Adapt to many tasks, several in each forward of the base model; for more than memory holds, see `adapt_folder`.

    Args:
        model: from `meta_peft.load`, or trained by `MetaTrainer`; it is left unchanged.
        tasks: support rows by task name, as for `adapt`.
        steps: gradient steps; by default as many as in meta-training.
        hold_back: a share of each task's rows, or a whole number of them, drawn at random, that it is not adapted on. Of
            the weights after 0, 1, ... `steps` steps, each task gets those with which the loss of its held-back rows is
            lowest (early stopping).
        tasks_per_forward: how many tasks with equally many rows go through the model at once. Where memory runs out,
            fewer are tried.
        progress: called with the number of tasks just finished.

    Raises:
        MetaPeftError: the model carries no meta-learned adapter, `tasks` is no mapping, or a row cannot be read.
    """
    if not isinstance(tasks, Mapping):
        raise MetaPeftError(
            f"tasks must be a mapping of task names to rows, such as {{'first': rows}}; got {type(tasks).__name__}. For the"
            " rows of one task, there is meta_peft.adapt."
        )
    learned = hub.meta_learned(model)
    check_hold_back(hold_back)
    form, judged = learned.sidecar.row_form, learned.sidecar.judged
    supports = {
        name: encoded_support(learned, name, form.of_rows(rows_of_task(support), judged.task_column[0]), hold_back)
        for name, support in tasks.items()
    }
    results: dict[str, Adapted] = {}
    for stack in adapted_stacks(model, supports, steps=steps, tasks_per_forward=tasks_per_forward):
        results.update(stack)
        progress(len(stack))
    return {name: results[name] for name in tasks}
