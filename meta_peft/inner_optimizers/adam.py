"""Adam (Kingma & Ba 2015, arXiv 1412.6980), written so that it can be differentiated through.

``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, the direction is
``(m / (1 - b1^k)) / (sqrt(v / (1 - b2^k) + eps_root) + eps) + weight_decay theta``. With `weight_decay` this is AdamW
(Loshchilov & Hutter 2019, arXiv 1711.05101).

`eps_root` is 0 in `torch.optim.Adam`; there the derivative of the square root is infinite where a gradient is exactly
zero, as it is for every LoRA A matrix while B is zero. A small positive value (as in optax) keeps it finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meta_peft.errors import MetaPeftError
from meta_peft.types import Params
from meta_peft.utils.checked import at_least, is_number, shown


@dataclass(frozen=True)
class Adam:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for option in ("beta1", "beta2"):
            if not (is_number(getattr(self, option)) and 0 <= getattr(self, option) < 1):
                raise MetaPeftError(f"{option} must be 0 or more and below 1; got {shown(getattr(self, option))}.")
        for option in ("eps", "eps_root", "weight_decay"):
            at_least(option, getattr(self, option), 0)

    def init(self, fast: Params) -> Params:
        return {f"{moment}.{name}": torch.zeros_like(p) for moment in ("m", "v") for name, p in fast.items()}

    def direction(self, step: int, fast: Params, grads: Params, state: Params) -> tuple[Params, Params]:
        directions, moments = {}, {}
        bias1, bias2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
        for name, g in grads.items():
            m = self.beta1 * state[f"m.{name}"] + (1 - self.beta1) * g
            v = self.beta2 * state[f"v.{name}"] + (1 - self.beta2) * g * g
            moments[f"m.{name}"], moments[f"v.{name}"] = m, v
            directions[name] = (m / bias1) / ((v / bias2 + self.eps_root).sqrt() + self.eps)
            if self.weight_decay:
                directions[name] = directions[name] + self.weight_decay * fast[name]
        return directions, moments
