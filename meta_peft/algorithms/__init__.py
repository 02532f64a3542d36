"""Estimators of the meta-gradient, one per file: ``(loss_fn, meta, episode_batch) -> MetaGradient``."""

from meta_peft.algorithms.implicit import ImplicitMAML
from meta_peft.algorithms.maml import MAML
from meta_peft.algorithms.multitask import MultiTask
from meta_peft.algorithms.reptile import Reptile

__all__ = ["MAML", "ImplicitMAML", "MultiTask", "Reptile"]
