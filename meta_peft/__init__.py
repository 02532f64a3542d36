"""Parameter-efficient meta-learning for language models.

``MetaTrainer`` learns a LoRA adapter from which a frozen language model adapts to a new task in a few gradient steps;
``load`` and ``adapt`` use it; ``meta_gradient`` is the one call for a training loop of one's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meta_peft.adaptation.adapt import adapt, adapt_many
    from meta_peft.adaptation.folder import adapt_folder
    from meta_peft.adaptation.stacks import Adapted
    from meta_peft.adapters.hub import load, push, save
    from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.errors import MetaPeftError
    from meta_peft.functional.adapter_loss import AdapterLoss
    from meta_peft.inner_optimizers import SGD, Adam, InnerRule
    from meta_peft.outer_loop.memory_plan import MemoryPlan
    from meta_peft.outer_loop.outer_loop import LearnedRates, assign_gradient, meta_gradient
    from meta_peft.processes import StepShares, StepSum
    from meta_peft.run_tasks.support import select_support
    from meta_peft.tasks import Encoding, EpisodeCollator, EpisodeDataset, Labelling, PromptFormat, TaskSet
    from meta_peft.tasks.batches import episode_batch
    from meta_peft.training.trainer import MetaTrainer

__version__ = "0.1.0"

_HOMES = {
    "Adapted": "adaptation.stacks",
    "adapt_folder": "adaptation.folder",
    "adapt": "adaptation.adapt",
    "adapt_many": "adaptation.adapt",
    "AdapterLoss": "functional.adapter_loss",
    "ImplicitMAML": "algorithms",
    "MAML": "algorithms",
    "MultiTask": "algorithms",
    "Reptile": "algorithms",
    "MetaLoraConfig": "config",
    "ModelArguments": "config",
    "TaskArguments": "config",
    "MetaPeftError": "errors",
    "load": "adapters.hub",
    "push": "adapters.hub",
    "save": "adapters.hub",
    "SGD": "inner_optimizers",
    "Adam": "inner_optimizers",
    "InnerRule": "inner_optimizers",
    "MemoryPlan": "outer_loop.memory_plan",
    "LearnedRates": "outer_loop.outer_loop",
    "assign_gradient": "outer_loop.outer_loop",
    "meta_gradient": "outer_loop.outer_loop",
    "StepShares": "processes",
    "StepSum": "processes",
    "Encoding": "tasks",
    "select_support": "run_tasks.support",
    "EpisodeCollator": "tasks",
    "EpisodeDataset": "tasks",
    "Labelling": "tasks",
    "PromptFormat": "tasks",
    "TaskSet": "tasks",
    "episode_batch": "tasks.batches",
    "MetaTrainer": "training.trainer",
}
__all__ = sorted(_HOMES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the core does not need the Trainer."""
    if name in _HOMES:
        return getattr(import_module(f"meta_peft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'meta_peft' has no attribute {name!r}")
