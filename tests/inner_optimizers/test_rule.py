from __future__ import annotations

import json
import math

import pytest
import torch

from meta_peft.errors import MetaPeftError
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.inner_optimizers.rule import RATES, scaled

ADAPTER = {"a": torch.ones(2, 2), "b": torch.ones(1, 3)}


def steps_of(rule: InnerRule, hyper, n: int):
    """How far each step moves each matrix, for gradients of one."""
    fast, state = ADAPTER, rule.optimizer.init(ADAPTER)
    moves = []
    for step in range(n):
        moved, state = rule.step(step, fast, {n: torch.ones_like(p) for n, p in ADAPTER.items()}, state, hyper)
        moves.append([(fast[n] - moved[n]).mean().item() for n in ADAPTER])
        fast = moved
    return torch.tensor(moves)


@pytest.mark.parametrize(("per_step", "steps", "shape"), [(False, 3, (1, 2)), (True, 3, (3, 2)), (True, 0, (1, 2))])
def test_initial_rates(per_step: bool, steps: int, shape: tuple[int, int]):
    log_rates = InnerRule(lr=0.5, steps=steps, rates_per_step=per_step).initial_rates(ADAPTER)[RATES]
    torch.testing.assert_close(log_rates.exp(), torch.full(shape, 0.5))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_rates_are_never_coarser_than_float32(dtype, expected):
    assert InnerRule().initial_rates({"a": torch.ones(1, 1, dtype=dtype)})[RATES].dtype == expected


def test_each_matrix_and_step_has_its_own_rate_and_later_steps_the_last():
    rule = InnerRule(steps=2, rates_per_step=True)
    rates = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    moves = steps_of(rule, {RATES: rates.log()}, 4)
    torch.testing.assert_close(moves, torch.stack([rates[0], rates[1], rates[1], rates[1]]))


def test_without_rates_per_step_every_step_has_the_same():
    rates = torch.tensor([[0.1, 0.2]])
    torch.testing.assert_close(steps_of(InnerRule(steps=2), {RATES: rates.log()}, 3), rates.expand(3, 2))


def test_scaled_multiplies_rates():
    rule = InnerRule(lr=0.1)
    hyper = rule.initial_rates(ADAPTER)
    torch.testing.assert_close(steps_of(rule, scaled(hyper, 3.0), 1), 3 * steps_of(rule, hyper, 1))
    assert scaled(hyper, 1.0)[RATES].equal(hyper[RATES])


def test_rate_zero_is_exactly_zero():
    rule = InnerRule(lr=0)
    assert (steps_of(rule, rule.initial_rates(ADAPTER), 2) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "inner_steps must be 0 or more, got -1"),
        ({"lr": -0.1}, "inner_lr must be a finite number of 0 or more, got -0.1"),
        ({"lr": math.nan}, "inner_lr must be a finite number of 0 or more, got nan"),
        ({"lr": math.inf}, "inner_lr must be a finite number of 0 or more, got inf"),
        ({"lr": 0, "learn_rates": True}, "inner_lr is 0: learned rates need a positive rate"),
    ],
)
def test_impossible_rules(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        InnerRule(**options)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.5), Adam(beta1=0.8, eps_root=1e-5)])
def test_survives_json(optimizer):
    rule = InnerRule(optimizer, lr=0.3, steps=4, learn_rates=True, rates_per_step=True)
    assert InnerRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_unknown_optimizer():
    with pytest.raises(MetaPeftError, match=r"Unknown inner optimizer 'lion': expected one of \['adam', 'sgd'\]"):
        InnerRule.from_dict({**InnerRule().to_dict(), "optimizer": {"name": "lion"}})
