"""What a model is set to while it is run as a function of its adapter, and set back from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, and not transformers' activation checkpointing: the loss is a fixed function of the adapter.

    That checkpointing would compute again during backward, when the fast weights are no longer in their layers.
    """
    training = [module for module in _modules(model) if module.training]
    _set_training(training, False)
    try:
        yield
    finally:
        _set_training(training, True)


def _modules(model: nn.Module) -> list[nn.Module]:
    """Those of ``model.modules()``, four times as fast: every forward asks for them, thousands in a model with LoRA."""
    found, seen = [model], {id(model)}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _set_training(modules: list[nn.Module], value: bool) -> None:
    """As by assignment, of which PyTorch asks each time whether it is a parameter: a hundred times as long."""
    for module in modules:
        module.__dict__["training"] = value


def configs_of(base: nn.Module) -> list[Any]:
    """The configs that the modules of a model look up how to return outputs in: an encoder may have one of its own."""
    found = (getattr(module, "config", None) for module in base.modules())
    return list({id(config): config for config in found if hasattr(config, "return_dict")}.values())


@contextmanager
def outputs_by_name(configs: Iterable[Any]) -> Iterator[None]:
    """Inside this context models return what has names, as is asked of them here, and not tuples."""
    tuples = [config for config in configs if not config.return_dict]
    for config in tuples:
        config.return_dict = True
    try:
        yield
    finally:
        for config in tuples:
            config.return_dict = False
