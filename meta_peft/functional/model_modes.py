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
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
