"""The inner rule: an optimizer's direction times a rate for each LoRA matrix.

``theta <- theta - exp(log_rates[k, i]) * direction_i`` for step k and matrix i, where the direction is that of the
task's loss plus ``proximal / 2 |theta - start|^2``, its gradient clipped to a norm of `clip` for each task. Rates are
kept as logarithms, so that learning them cannot turn one negative. A rate for each entry is Meta-SGD (Li et al. 2017,
arXiv 1707.09835), one for each matrix the same at the granularity of layers, and one for each matrix and step that of
MAML++ (Antoniou et al. 2019, arXiv 1810.09502). Where only some matrices are fast weights, as in ANIL (Raghu et al.
2020, arXiv 1909.09157), the others are learned by the outer loop alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.inner_optimizers.adam import Adam
from meta_peft.inner_optimizers.sgd import SGD
from meta_peft.params import dot, per_task
from meta_peft.types import Params
from meta_peft.utils.checked import flag, is_number, is_whole, shown
from meta_peft.utils.patterns import check_pattern, matches

RATES = "log_rates"
MOST_STEPS = 10_000  # more would be a mistake, or somebody else's way to keep a machine busy
START = "start of "  # the state's entries that the proximal term pulls towards
OPTIMIZERS: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam}


class InnerOptimizer(Protocol):
    """Turns gradients into update directions by differentiable operations; its state is a dict of tensors."""

    def init(self, fast: Params) -> Params: ...

    def direction(self, step: int, fast: Params, grads: Params, state: Params) -> tuple[Params, Params]: ...


@dataclass(frozen=True)
class InnerRule:
    """How fast weights move: `steps` steps of `optimizer`, from rate `lr`.

    Args:
        optimizer: `SGD` or `Adam` of this package.
        lr: the rate of every matrix, where rates are not learned or not yet.
        steps: how many inner steps the outer loop differentiates through; at use there may be more or fewer.
        learn_rates: whether the outer loop learns one rate per LoRA matrix.
        rates_per_step: whether each of the `steps` steps has rates of its own; later steps use the last ones.
        rates_per_entry: whether each entry of a matrix has a rate of its own.
        clip: largest norm of a task's gradient over all its fast weights; None does not clip.
        proximal: strength of the pull towards the start, as implicit MAML needs it.
        fast: a regular expression searched for in the names of the LoRA matrices, such as ``layers\\.(28|29)\\.`` or
            ``lora_B``; those it is found in are fast weights. None means all.
    """

    optimizer: SGD | Adam = field(default_factory=SGD)
    lr: float = 0.01
    steps: int = 3
    learn_rates: bool = False
    rates_per_step: bool = False
    rates_per_entry: bool = False
    clip: float | None = None
    proximal: float = 0.0
    fast: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, tuple(OPTIMIZERS.values())):
            raise MetaPeftError(
                f"optimizer must be SGD() or Adam() of meta_peft, with parentheses, as in InnerRule(Adam(), lr=0.002); got"
                f" {shown(self.optimizer)}. Steps of torch's optimizers have no derivative."
            )
        if not (is_whole(self.steps) and 0 <= self.steps <= MOST_STEPS):
            raise MetaPeftError(
                f"inner_steps must be 0 or more, got {shown(self.steps)}: a whole number of at most {MOST_STEPS}."
            )
        if not (is_number(self.lr) and self.lr >= 0):
            raise MetaPeftError(f"inner_lr must be a finite number of 0 or more, got {shown(self.lr)}.")
        for option in ("learn_rates", "rates_per_step", "rates_per_entry"):
            flag(option, getattr(self, option))
        if self.learn_rates and self.lr == 0:
            raise MetaPeftError("inner_lr is 0: learned rates need a positive rate to start from.")
        if self.clip is not None and not (is_number(self.clip) and self.clip > 0):
            raise MetaPeftError(
                f"inner_max_grad_norm must be positive, or None for no clipping; got {shown(self.clip)}."
            )
        if not (is_number(self.proximal) and self.proximal >= 0):
            raise MetaPeftError(f"proximal must be a finite number of 0 or more, got {shown(self.proximal)}.")
        if self.fast is not None:
            check_pattern("fast_weights", self.fast)

    @property
    def passes_adjoints_on(self) -> bool:
        """Whether, with gradients taken as constants, a step is the identity plus constants."""
        return not (self.learn_rates or self.proximal or getattr(self.optimizer, "weight_decay", 0.0))

    def fast_names(self, names: Iterable[str]) -> list[str]:
        """Those of the LoRA matrices that are fast weights."""
        names = tuple(names)
        if self.fast is None:
            return list(names)
        found = [
            name for name, is_fast in zip(names, matches("fast_weights", self.fast, names), strict=True) if is_fast
        ]
        if not found:
            raise MetaPeftError(
                f"fast_weights={self.fast!r} is found in the name of no LoRA matrix. They have names like"
                f" {', '.join(names[:2])}."
            )
        return found

    def split(self, adapter: Params) -> tuple[Params, Params]:
        """The fast weights, and the others."""
        fast = {name: adapter[name] for name in self.fast_names(adapter)}
        return fast, {name: p for name, p in adapter.items() if name not in fast}

    def initial_rates(self, adapter: Params) -> Params:
        """The hyper-parameters to start from: log rates ``[S, n]`` for S = 1 or `steps` and n fast matrices or entries."""
        first = adapter[self.fast_names(adapter)[0]]
        shape = (max(self.steps, 1) if self.rates_per_step else 1, sum(self.rates_of_each(adapter).values()))
        dtype = first.dtype if first.dtype == torch.float64 else torch.float32
        log_lr = math.log(self.lr) if self.lr > 0 else -math.inf
        return {RATES: torch.full(shape, log_lr, dtype=dtype, device=first.device)}

    def rates_of_each(self, adapter: Params) -> dict[str, int]:
        """How many rates each fast weight has for a step, in the order of the columns of the rates."""
        return {name: adapter[name].numel() if self.rates_per_entry else 1 for name in self.fast_names(adapter)}

    def init(self, fast: Params) -> Params:
        """The state before the first step."""
        starts = {START + name: p for name, p in fast.items()} if self.proximal else {}
        return {**self.optimizer.init(fast), **starts}

    def step(self, step: int, fast: Params, grads: Params, state: Params, hyper: Params) -> tuple[Params, Params]:
        """One update of a stack of fast weights, the tasks along the first dimension."""
        starts = {name: p for name, p in state.items() if name.startswith(START)}
        if self.proximal:
            grads = {n: g + self.proximal * (fast[n] - starts[START + n]) for n, g in grads.items()}
        if self.clip is not None:
            grads = _clipped(grads, self.clip)
        directions, state = self.optimizer.direction(step, fast, grads, state)
        rates = self._rates(step, fast, hyper)
        moved = {n: torch.addcmul(p, directions[n], rates[n], value=-1) for n, p in fast.items()}
        return moved, {**state, **starts}

    def _rates(self, step: int, fast: Params, hyper: Params) -> Params:
        """Per matrix a number, or a matrix with `rates_per_entry`."""
        rates: Tensor = hyper[RATES][min(step, hyper[RATES].shape[0] - 1)].exp()
        if not self.rates_per_entry:
            return dict(zip(fast, rates, strict=True))
        shapes = [p.shape[1:] for p in fast.values()]
        parts = rates.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(fast, parts, shapes, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        name = next(n for n, kind in OPTIMIZERS.items() if isinstance(self.optimizer, kind))
        return {**asdict(self), "optimizer": {"name": name, **asdict(self.optimizer)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InnerRule:
        optimizer = dict(values["optimizer"])
        name = optimizer.pop("name")
        if not isinstance(name, str) or name not in OPTIMIZERS:
            raise MetaPeftError(f"Unknown inner optimizer {shown(name)}: expected one of {sorted(OPTIMIZERS)}.")
        return cls(**{**values, "optimizer": OPTIMIZERS[name](**optimizer)})


def check_rule(inner: object) -> None:
    """Raise unless what an algorithm was given to adapt by is an `InnerRule`."""
    if not isinstance(inner, InnerRule):
        raise MetaPeftError(
            f"inner must be an InnerRule, which has the optimizer and its rate, as in MAML(InnerRule(SGD(), lr=0.1)); got"
            f" {shown(inner)}."
        )


def _clipped(grads: Params, largest: float) -> Params:
    """Each task's gradient scaled down to a norm of `largest` if it is longer."""
    # Clamped below the bound, where the scale is 1, so that the derivative of the root is never infinite.
    scale_T = largest * dot(grads, grads).clamp_min(largest**2).rsqrt()
    return {name: g * per_task(scale_T, g) for name, g in grads.items()}


def scaled(hyper: Params, factor: float) -> Params:
    """The same rates times `factor`."""
    return {**hyper, RATES: hyper[RATES] + math.log(factor)}
