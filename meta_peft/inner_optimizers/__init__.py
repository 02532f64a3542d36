"""Differentiable update rules of the inner loop."""

from meta_peft.inner_optimizers.adam import Adam
from meta_peft.inner_optimizers.rule import InnerOptimizer, InnerRule
from meta_peft.inner_optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "InnerOptimizer", "InnerRule"]
