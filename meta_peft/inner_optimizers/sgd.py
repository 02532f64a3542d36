"""``v <- momentum * v + g``; the direction is v. With momentum 0, plain gradient descent (as `torch.optim.SGD`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meta_peft.types import Params
from meta_peft.utils.checked import at_least


@dataclass(frozen=True)
class SGD:
    momentum: float = 0.0

    def __post_init__(self) -> None:
        at_least("momentum", self.momentum, 0)

    def init(self, fast: Params) -> Params:
        if not self.momentum:
            return {}
        return {name: torch.zeros_like(p) for name, p in fast.items()}

    def direction(self, step: int, fast: Params, grads: Params, state: Params) -> tuple[Params, Params]:
        if not self.momentum:
            return grads, state
        velocity = {name: self.momentum * state[name] + g for name, g in grads.items()}
        return velocity, velocity
