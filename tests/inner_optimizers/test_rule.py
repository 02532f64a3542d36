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


def test_each_entry_has_its_own_rate():
    rule = InnerRule(rates_per_entry=True, rates_per_step=True, steps=2)
    hyper = rule.initial_rates(ADAPTER)
    assert hyper[RATES].shape == (2, 7)
    rates = torch.arange(1.0, 15).view(2, 7) / 100
    fast, ones = (
        {n: p.expand(3, *p.shape) for n, p in ADAPTER.items()},
        {n: torch.ones(3, *p.shape) for n, p in ADAPTER.items()},
    )
    for step, row in ((0, 0), (1, 1), (5, 1)):
        moved, _ = rule.step(step, fast, ones, {}, {RATES: rates.log()})
        for t in range(3):
            torch.testing.assert_close(fast["a"][t] - moved["a"][t], rates[row, :4].view(2, 2))
            torch.testing.assert_close(fast["b"][t] - moved["b"][t], rates[row, 4:].view(1, 3))


# ---- which weights are fast


def test_weights_are_fast_whose_names_match():
    names = [f"layers.{i}.{part}.weight" for i in (1, 11) for part in ("lora_A", "lora_B")]
    assert InnerRule().fast_names(names) == names
    assert InnerRule(fast="lora_B").fast_names(names) == [names[1], names[3]]
    assert InnerRule(fast=r"layers\.1\.").fast_names(names) == names[:2]
    assert InnerRule(fast=r"layers\.(1|11)\.lora_A").fast_names(iter(names)) == [names[0], names[2]]


def test_rates_are_those_of_fast_weights_alone():
    rule = InnerRule(fast="b")
    fast, slow = rule.split(ADAPTER)
    assert (list(fast), list(slow)) == (["b"], ["a"])
    assert rule.initial_rates(ADAPTER)[RATES].shape == (1, 1)
    assert InnerRule(fast="b", rates_per_entry=True).initial_rates(ADAPTER)[RATES].shape == (1, 3)


def test_each_fast_weight_has_as_many_rates_as_its_columns():
    for options in ({}, {"fast": "b"}, {"rates_per_entry": True}):
        rule = InnerRule(**options)
        assert sum(rule.rates_of_each(ADAPTER).values()) == rule.initial_rates(ADAPTER)[RATES].shape[1]
    assert InnerRule().rates_of_each(ADAPTER) == {"a": 1, "b": 1}
    assert InnerRule(rates_per_entry=True).rates_of_each(ADAPTER) == {"a": 4, "b": 3}


def test_a_pattern_that_matches_nothing():
    with pytest.raises(MetaPeftError, match=r"fast_weights='lora_C' is found in the name of no LoRA matrix.*like a, b"):
        InnerRule(fast="lora_C").split(ADAPTER)


# ---- clipping, and the pull towards the start


def moved_by(rule: InnerRule, grads, fast=None, state=None):
    fast = fast or {"a": torch.zeros(2, 2, 2), "b": torch.zeros(2, 1, 3)}
    state = rule.init(fast) if state is None else state
    moved, _ = rule.step(0, fast, grads, state, rule.initial_rates(ADAPTER))
    return {n: fast[n] - moved[n] for n in fast}


def test_the_gradient_of_a_task_is_scaled_to_the_largest_norm():
    """Over all of its matrices together, as `torch.nn.utils.clip_grad_norm_` does for one task; for each task alone."""
    grads = {"a": torch.ones(2, 2, 2), "b": torch.ones(2, 1, 3)}
    grads = {n: g * torch.tensor([3.0, 0.01]).view(2, 1, 1) for n, g in grads.items()}
    moves = moved_by(InnerRule(lr=1.0, clip=0.5), grads)
    for t in range(2):
        own = [torch.zeros_like(g[t]).requires_grad_() for g in grads.values()]
        for parameter, g in zip(own, grads.values(), strict=True):
            parameter.grad = g[t].clone()
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        for parameter, move in zip(own, moves.values(), strict=True):
            torch.testing.assert_close(move[t], parameter.grad, rtol=1e-5, atol=1e-7)
    assert torch.cat([m[0].flatten() for m in moves.values()]).norm().item() == pytest.approx(0.5)
    torch.testing.assert_close(moves["a"][1], grads["a"][1])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_clipping_has_a_finite_derivative_at_any_length(size: float):
    grads = {"a": torch.full((2, 2, 2), size, requires_grad=True), "b": torch.full((2, 1, 3), size)}
    moves = moved_by(InnerRule(lr=1.0, clip=0.5), grads)
    (derivative,) = torch.autograd.grad(moves["a"].sum(), grads["a"])
    assert derivative.isfinite().all()


def test_the_pull_is_towards_the_start_and_is_clipped_with_the_gradient():
    rule = InnerRule(lr=1.0, proximal=2.0)
    start = {"a": torch.ones(2, 2, 2), "b": torch.ones(2, 1, 3)}
    state, zeros = rule.init(start), {n: torch.zeros_like(p) for n, p in start.items()}
    away = {n: p + 0.25 for n, p in start.items()}
    assert all((move == 0).all() for move in moved_by(rule, zeros, start, state).values())
    assert all((move == 0.5).all() for move in moved_by(rule, zeros, away, state).values())
    clipped = moved_by(InnerRule(lr=1.0, proximal=2.0, clip=0.1), zeros, away, state)
    assert torch.cat([m[0].flatten() for m in clipped.values()]).norm().item() == pytest.approx(0.1, rel=1e-5)


def test_the_start_is_kept_in_the_state():
    rule = InnerRule(Adam(), proximal=2.0)
    fast = {"a": torch.ones(2, 2, 2)}
    state = rule.init(fast)
    _, after = rule.step(0, {"a": torch.zeros(2, 2, 2)}, fast, state, rule.initial_rates({"a": torch.ones(2, 2)}))
    assert after.keys() == state.keys()
    assert torch.equal(after["start of a"], fast["a"])


def test_a_step_is_the_identity_plus_constants_unless_it_depends_on_the_weights():
    """Then a walk back through first-order steps changes nothing, and they need not be remembered."""
    assert InnerRule(SGD(0.9), clip=0.5).passes_adjoints_on
    assert InnerRule(Adam()).passes_adjoints_on
    for rule in (InnerRule(learn_rates=True), InnerRule(proximal=1.0), InnerRule(Adam(weight_decay=0.1))):
        assert not rule.passes_adjoints_on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "inner_max_grad_norm must be positive, or None for no clipping; got 0.0"),
        ({"clip": -1.0}, "inner_max_grad_norm must be positive"),
        ({"proximal": -1.0}, "proximal must be a finite number of 0 or more, got -1.0"),
        ({"proximal": math.inf}, "proximal must be a finite number of 0 or more, got inf"),
        ({"fast": "["}, r"fast_weights='\[' is not a regular expression"),
        ({"steps": -1}, "inner_steps must be 0 or more, got -1"),
        ({"lr": -0.1}, "inner_lr must be a finite number of 0 or more, got -0.1"),
        ({"lr": math.nan}, "inner_lr must be a finite number of 0 or more, got nan"),
        ({"lr": math.inf}, "inner_lr must be a finite number of 0 or more, got inf"),
        ({"lr": 0, "learn_rates": True}, "inner_lr is 0: learned rates need a positive rate"),
        ({"optimizer": Adam}, r"optimizer must be SGD\(\) or Adam\(\) of meta_peft, with parentheses, as in .*Adam'>"),
        ({"optimizer": torch.optim.SGD}, "optimizer must be .*; got <class 'torch.*SGD'>. Steps of torch's optimizers"),
        ({"optimizer": "adam"}, "optimizer must be .*; got 'adam'"),
        ({"optimizer": 0.1}, "optimizer must be .*; got 0.1"),
        ({"steps": True}, "inner_steps must be 0 or more, got True: a whole number"),
    ],
)
def test_impossible_rules(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        InnerRule(**options)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.5), Adam(beta1=0.8, eps_root=1e-5, weight_decay=0.1)])
def test_survives_json(optimizer):
    rule = InnerRule(optimizer, lr=0.3, steps=4, learn_rates=True, rates_per_step=True)
    assert InnerRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    rule = InnerRule(optimizer, rates_per_entry=True, clip=0.5, proximal=2.0, fast=r"layers\.1\.")
    assert InnerRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_unknown_optimizer():
    with pytest.raises(MetaPeftError, match=r"Unknown inner optimizer 'lion': expected one of \['adam', 'sgd'\]"):
        InnerRule.from_dict({**InnerRule().to_dict(), "optimizer": {"name": "lion"}})
