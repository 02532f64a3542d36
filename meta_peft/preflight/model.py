"""A model as it is given: a PEFT model with one adapter to be learned."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.lora.fast_weights import active_adapter, meta_learned_adapter
from meta_peft.preflight.adapter_config import check_config, check_options
from meta_peft.preflight.base import check_base, check_quantised
from meta_peft.preflight.head import check_head
from meta_peft.preflight.layers import check_layers


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
    check_config(model.peft_config[adapter], adapter)
    check_layers(model, adapter)
    check_options(model.peft_config[adapter])
    check_head(model, adapter)
    check_base(model.get_base_model(), second_order=second_order)
    check_quantised(model)


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
