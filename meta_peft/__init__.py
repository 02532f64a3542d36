"""Parameter-efficient meta-learning for language models.

``MetaTrainer`` learns a LoRA adapter from which a frozen language model adapts to a new task in a few gradient steps;
``load`` and ``adapt`` use it; ``meta_gradient`` is the one call for a training loop of one's own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meta_peft.adapt import Adapted, adapt, adapt_many
    from meta_peft.adapter_loss import AdapterLoss
    from meta_peft.algorithms import MAML, MultiTask, Reptile
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.errors import MetaPeftError
    from meta_peft.hub import load, push, save
    from meta_peft.inner_optimizers import SGD, Adam, InnerRule
    from meta_peft.meta_gradient import LearnedRates, assign_gradient, meta_gradient
    from meta_peft.tasks import EpisodeCollator, EpisodeDataset, PromptFormat, TaskSet
    from meta_peft.trainer import MetaTrainer

__version__ = "0.1.0"

_HOMES = {
    "Adapted": "adapt",
    "adapt": "adapt",
    "adapt_many": "adapt",
    "AdapterLoss": "adapter_loss",
    "MAML": "algorithms",
    "MultiTask": "algorithms",
    "Reptile": "algorithms",
    "MetaLoraConfig": "config",
    "ModelArguments": "config",
    "TaskArguments": "config",
    "MetaPeftError": "errors",
    "load": "hub",
    "push": "hub",
    "save": "hub",
    "SGD": "inner_optimizers",
    "Adam": "inner_optimizers",
    "InnerRule": "inner_optimizers",
    "LearnedRates": "meta_gradient",
    "assign_gradient": "meta_gradient",
    "meta_gradient": "meta_gradient",
    "EpisodeCollator": "tasks",
    "EpisodeDataset": "tasks",
    "PromptFormat": "tasks",
    "TaskSet": "tasks",
    "MetaTrainer": "trainer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the core does not need the Trainer."""
    if name in _HOMES:
        return getattr(import_module(f"meta_peft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'meta_peft' has no attribute {name!r}")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """`adapt` and `meta_gradient` are functions; importing the modules they live in must not hide them."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
