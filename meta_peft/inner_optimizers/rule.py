"""The inner rule: an optimizer's direction times a rate for each LoRA matrix.

``theta <- theta - exp(log_rates[k, i]) * direction_i`` for step k and matrix i. Rates are kept as logarithms, so that
learning them cannot turn one negative. One rate per matrix is Meta-SGD's idea (Li et al. 2017, arXiv 1707.09835) at
the granularity of layers; one per matrix and step is that of MAML++ (Antoniou et al. 2019, arXiv 1810.09502).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.inner_optimizers.adam import Adam
from meta_peft.inner_optimizers.sgd import SGD
from meta_peft.types import Params

RATES = "log_rates"
OPTIMIZERS: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam}


class InnerOptimizer(Protocol):
    """Turns gradients into update directions by differentiable operations; its state is a dict of tensors."""

    def init(self, fast: Params) -> Params: ...

    def direction(self, step: int, grads: Params, state: Params) -> tuple[Params, Params]: ...


@dataclass(frozen=True)
class InnerRule:
    """How fast weights move: `steps` steps of `optimizer`, from rate `lr`.

    Args:
        optimizer: `SGD` or `Adam` of this package.
        lr: the rate of every matrix, where rates are not learned or not yet.
        steps: how many inner steps the outer loop differentiates through; at use there may be more or fewer.
        learn_rates: whether the outer loop learns one rate per LoRA matrix.
        rates_per_step: whether each of the `steps` steps has rates of its own; later steps use the last ones.
    """

    optimizer: SGD | Adam = field(default_factory=SGD)
    lr: float = 0.01
    steps: int = 3
    learn_rates: bool = False
    rates_per_step: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise MetaPeftError(f"inner_steps must be 0 or more, got {self.steps}.")
        if not (self.lr >= 0 and math.isfinite(self.lr)):
            raise MetaPeftError(f"inner_lr must be a finite number of 0 or more, got {self.lr}.")
        if self.learn_rates and self.lr == 0:
            raise MetaPeftError("inner_lr is 0: learned rates need a positive rate to start from.")

    def initial_rates(self, adapter: Params) -> Params:
        """The hyper-parameters to start from: log rates ``[S, n]`` for S = 1 or `steps` and n matrices."""
        first = next(iter(adapter.values()))
        shape = (max(self.steps, 1) if self.rates_per_step else 1, len(adapter))
        dtype = first.dtype if first.dtype == torch.float64 else torch.float32
        log_lr = math.log(self.lr) if self.lr > 0 else -math.inf
        return {RATES: torch.full(shape, log_lr, dtype=dtype, device=first.device)}

    def step(self, step: int, fast: Params, grads: Params, state: Params, hyper: Params) -> tuple[Params, Params]:
        """One update of a stack of fast weights."""
        directions, state = self.optimizer.direction(step, grads, state)
        rates: Tensor = hyper[RATES][min(step, hyper[RATES].shape[0] - 1)].exp()
        moved = {name: p - rate * directions[name] for (name, p), rate in zip(fast.items(), rates, strict=True)}
        return moved, state

    def to_dict(self) -> dict[str, Any]:
        name = next(n for n, kind in OPTIMIZERS.items() if isinstance(self.optimizer, kind))
        return {**asdict(self), "optimizer": {"name": name, **asdict(self.optimizer)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InnerRule:
        optimizer = dict(values["optimizer"])
        name = optimizer.pop("name")
        if name not in OPTIMIZERS:
            raise MetaPeftError(f"Unknown inner optimizer {name!r}: expected one of {sorted(OPTIMIZERS)}.")
        return cls(**{**values, "optimizer": OPTIMIZERS[name](**optimizer)})


def scaled(hyper: Params, factor: float) -> Params:
    """The same rates times `factor`."""
    return {**hyper, RATES: hyper[RATES] + math.log(factor)}
