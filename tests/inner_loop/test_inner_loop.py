from __future__ import annotations

from itertools import pairwise

import pytest
from tiny_models import assert_equal, random_rows, tiny

from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import Adam, InnerRule
from meta_peft.params import expand, take_task


@pytest.fixture
def loss_fn() -> AdapterLoss:
    return AdapterLoss(tiny())


def start(loss_fn: AdapterLoss):
    return {n: p.detach() for n, p in loss_fn.weights.parameters().items()}


def stack(loss_fn: AdapterLoss):
    return expand(start(loss_fn), 3)


def test_tasks_of_a_stack_do_not_interact(loss_fn: AdapterLoss):
    rule, rows = InnerRule(Adam(), lr=0.02, steps=3), random_rows()
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    together = adapt(loss_fn, start(loss_fn), hyper, rows, rule)
    for t in range(3):
        alone = adapt(loss_fn, start(loss_fn), hyper, rows.tasks(t, t + 1), rule)
        assert_equal(take_task(alone, 0), take_task(together, t), 1e-12)


def test_adapting_lowers_the_loss_on_the_rows_adapted_to(loss_fn: AdapterLoss):
    rule, rows, losses = InnerRule(lr=0.01, steps=5), random_rows(), []
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    adapt(loss_fn, start(loss_fn), hyper, rows, rule, after_step=lambda k, f: losses.append(loss_fn(f, rows).detach()))
    assert len(losses) == 6
    assert all((after < before).all() for before, after in pairwise(losses))


def test_after_step_sees_every_step_and_steps_can_be_chosen(loss_fn: AdapterLoss):
    rule, rows, seen = InnerRule(lr=0.02, steps=2), random_rows(), {}
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    end = adapt(loss_fn, start(loss_fn), hyper, rows, rule, steps=4, after_step=seen.__setitem__)
    assert list(seen) == [0, 1, 2, 3, 4]
    assert all(p.is_leaf for fast in seen.values() for p in fast.values())  # or a graph would grow with every step
    assert_equal(seen[0], stack(loss_fn), 0)
    assert_equal(seen[4], end, 0)
    assert_equal(adapt(loss_fn, start(loss_fn), hyper, rows, rule), {n: p.detach() for n, p in seen[2].items()}, 0)
    assert_equal(adapt(loss_fn, start(loss_fn), hyper, rows, rule, steps=0), seen[0], 0)


def test_rate_zero_is_no_adaptation(loss_fn: AdapterLoss):
    rule, rows = InnerRule(Adam(), lr=0, steps=3), random_rows()
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    assert_equal(adapt(loss_fn, start(loss_fn), hyper, rows, rule), stack(loss_fn), 0)


def test_the_model_keeps_its_own_weights(loss_fn: AdapterLoss):
    rule = InnerRule(lr=0.5, steps=2)
    before = {n: p.detach().clone() for n, p in loss_fn.weights.parameters().items()}
    adapt(loss_fn, start(loss_fn), rule.initial_rates(before), random_rows(), rule)
    assert_equal(dict(loss_fn.weights.parameters()), before, 0)
    assert all(p.grad is None for p in loss_fn.weights.parameters().values())
