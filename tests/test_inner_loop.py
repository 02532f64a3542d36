from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import assert_equal, random_rows, tiny

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.inner_loop import adapt, adapt_differentiably
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.params import expand, gradients, leaves, take_task


@pytest.fixture
def loss_fn() -> AdapterLoss:
    return AdapterLoss(tiny())


def start(loss_fn: AdapterLoss, n_tasks: int = 3):
    return expand(dict(loss_fn.weights.parameters()), n_tasks)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("optimizer", [SGD(), SGD(momentum=0.9), Adam()])
def test_numbers_and_functions_take_the_same_steps(loss_fn: AdapterLoss, optimizer, second_order: bool):
    rule, rows = InnerRule(optimizer, lr=0.02, steps=3, rates_per_step=True), random_rows()
    fast = leaves(start(loss_fn))
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    as_function = adapt_differentiably(loss_fn, fast, hyper, rows, rule, second_order=second_order)
    as_numbers = adapt(loss_fn, fast, hyper, rows, rule)
    assert_equal(as_numbers, {n: p.detach() for n, p in as_function.items()}, 1e-12)
    assert all(p.requires_grad for p in as_function.values())
    assert not any(p.requires_grad for p in as_numbers.values())


def test_first_order_updates_depend_on_the_start_as_the_identity(loss_fn: AdapterLoss):
    rule, fast = InnerRule(lr=0.02, steps=2), leaves(start(loss_fn))
    moved = adapt_differentiably(
        loss_fn, fast, rule.initial_rates(dict(loss_fn.weights.parameters())), random_rows(), rule, second_order=False
    )
    grads = gradients(sum(p.sum() for p in moved.values()), fast)
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads.values())


def test_tasks_of_a_stack_do_not_interact(loss_fn: AdapterLoss):
    rule, rows = InnerRule(Adam(), lr=0.02, steps=3), random_rows()
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    together = adapt(loss_fn, start(loss_fn), hyper, rows, rule)
    for t in range(3):
        alone = adapt(loss_fn, start(loss_fn, 1), hyper, rows.tasks(t, t + 1), rule)
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
    assert_equal(seen[0], {n: p.detach() for n, p in start(loss_fn).items()}, 0)
    assert_equal(seen[4], end, 0)
    assert_equal(adapt(loss_fn, start(loss_fn), hyper, rows, rule), {n: p.detach() for n, p in seen[2].items()}, 0)
    assert_equal(adapt(loss_fn, start(loss_fn), hyper, rows, rule, steps=0), seen[0], 0)


def test_rate_zero_is_no_adaptation(loss_fn: AdapterLoss):
    rule, rows = InnerRule(Adam(), lr=0, steps=3), random_rows()
    hyper = rule.initial_rates(dict(loss_fn.weights.parameters()))
    assert_equal(adapt(loss_fn, start(loss_fn), hyper, rows, rule), start(loss_fn), 0)


def test_the_model_keeps_its_own_weights(loss_fn: AdapterLoss):
    rule = InnerRule(lr=0.5, steps=2)
    before = {n: p.detach().clone() for n, p in loss_fn.weights.parameters().items()}
    adapt(loss_fn, start(loss_fn), rule.initial_rates(before), random_rows(), rule)
    assert_equal(dict(loss_fn.weights.parameters()), before, 0)
    assert all(p.grad is None for p in loss_fn.weights.parameters().values())
