from __future__ import annotations

import pytest
import torch
from tiny_models import assert_equal, plain_loss, random_batch, reference_model, tiny
from torch import Tensor
from toys import quadratic, quadratic_problem

from meta_peft.algorithms import MAML
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import SGD, InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.params import gradients, leaves
from meta_peft.types import EpisodeBatch, Meta, Params


@pytest.fixture
def problem():
    return quadratic_problem()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 10])
def test_closed_form_on_a_quadratic(problem, steps: int, first_order: bool):
    """Every step multiplies the distance to the support's centre by ``1 - rate * curvature``."""
    adapter, batch = problem
    rule = InnerRule(lr=0.2, steps=steps, learn_rates=True, rates_per_step=True)
    log_rates = rule.initial_rates(adapter)[RATES] + 0.3 * torch.randn(max(steps, 1), 2, dtype=torch.float64)
    result = MAML(rule, first_order)(quadratic, Meta(adapter, {RATES: log_rates}), batch)

    rates = log_rates[:steps, 1].exp()  # the matrices are in the order of the dict
    h, c = batch.support.inputs["curvature"], batch.support.inputs["centre"]
    shrink = [1 - rate * h for rate in rates]
    product = torch.stack([*shrink, torch.ones_like(h)]).prod(0)
    end = c + product * (adapter["w"] - c)
    at_query = batch.query.inputs["curvature"] * (end - batch.query.inputs["centre"])
    loss_T = (at_query * (end - batch.query.inputs["centre"]) / 2).sum((1, 2))
    assert_equal({"loss": result.metrics["loss"]}, {"loss": loss_T}, 1e-12)

    through = 1 if first_order else product
    expected = {"unused": torch.zeros(1, 1, dtype=torch.float64), "w": (at_query * through).mean(0)}
    assert_equal(result.grads.adapter, expected, 1e-12)
    for k in range(steps):
        before = torch.stack([*shrink[:k], torch.ones_like(h)]).prod(0) * (adapter["w"] - c)
        after = 1 if first_order else torch.stack([*shrink[k + 1 :], torch.ones_like(h)]).prod(0)
        moved = -rates[k] * h * before * after  # d end / d log rate
        found = result.grads.hyper[RATES][k]
        torch.testing.assert_close(found[1], (at_query * moved).sum((1, 2)).mean(), rtol=1e-12, atol=0)
        assert found[0] == 0
    assert result.n_tasks == 4


def test_rates_have_no_gradient_unless_they_are_learned(problem):
    adapter, batch = problem
    rule = InnerRule(steps=1)
    assert MAML(rule)(quadratic, Meta(adapter, rule.initial_rates(adapter)), batch).grads.hyper == {}


def test_the_parameters_given_get_no_gradient_and_no_graph(problem):
    adapter, batch = problem
    own = leaves(adapter)
    result = MAML()(quadratic, Meta(own, InnerRule().initial_rates(own)), batch)
    assert all(p.grad is None for p in own.values())
    tensors = [*result.grads.adapter.values(), *result.metrics.values()]
    assert not any(t.requires_grad for t in tensors)


def test_second_order_is_asked_of_the_loss_only_where_it_is_needed():
    assert MAML(InnerRule(steps=1)).second_order
    assert not MAML(InnerRule(steps=0)).second_order
    assert not MAML(first_order=True).second_order
    assert MAML(second_order_steps=1).second_order
    assert not MAML(second_order_steps=0).second_order
    assert not MAML(memory="finite_differences").second_order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory": "reply"},
            "memory must be one of auto, unrolled, replay, finite_differences, or a number of inner steps;"
            " got 'reply'. Did you mean 'replay'?",
        ),
        ({"memory": -1}, "or a number of inner steps; got -1"),
        ({"second_order_steps": -1}, "second_order_steps must be 0 or more, or None; got -1"),
        ({"multi_step": -0.1}, "multi_step must be from 0 to 1, got -0.1"),
        ({"multi_step": 1.5}, "multi_step must be from 0 to 1, got 1.5"),
        ({"multi_step": "0.5"}, "multi_step must be from 0 to 1, got '0.5': a number"),
        ({"memory": None}, "or a number of inner steps; got None"),
        ({"memory": 1.5}, "or a number of inner steps; got 1.5"),
        ({"memory": True}, "or a number of inner steps; got True"),
        ({"second_order_steps": 1.5}, "second_order_steps must be 0 or more, or None; got 1.5: a whole number"),
        ({"second_order_steps": "1"}, "second_order_steps must be 0 or more, or None; got '1': a whole number"),
        ({"first_order": "no"}, "first_order must be true or false; got 'no'"),
    ],
)
def test_impossible_options(options: dict, message: str):
    with pytest.raises(MetaPeftError) as error:
        MAML(**options)
    assert message in str(error.value)


# On a real model, where the loss is no quadratic and the reference is PEFT's own forward.


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def loss_fn(model):
    return AdapterLoss(model)


def run(algorithm: MAML, loss_fn: AdapterLoss, batch: EpisodeBatch, log_rates: Tensor | None = None):
    adapter = dict(loss_fn.weights.parameters())
    hyper = algorithm.inner.initial_rates(adapter) if log_rates is None else {RATES: log_rates}
    return algorithm(loss_fn, Meta(adapter, hyper), batch)


@pytest.mark.parametrize("rule", [InnerRule(steps=0), InnerRule(lr=0, steps=2)])
def test_without_adaptation_it_is_the_gradient_of_the_query_loss(loss_fn, rule: InnerRule):
    batch, adapter = random_batch(), leaves(dict(loss_fn.weights.parameters()))
    result = run(MAML(rule), loss_fn, batch)
    assert_equal(result.grads.adapter, gradients(loss_fn(adapter, batch.query).mean(), adapter), 1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_first_order_equals_a_calculation_by_hand(model, loss_fn, momentum: float):
    """The query gradient after the steps; a rate's gradient is minus rate * <direction of its step, query gradient>."""
    batch, reference = random_batch(), reference_model(model)
    rule = InnerRule(SGD(momentum), lr=0.02, steps=3, learn_rates=True, rates_per_step=True)
    log_rates = rule.initial_rates(dict(loss_fn.weights.parameters()))[RATES]
    log_rates = log_rates + 0.3 * torch.randn(log_rates.shape, dtype=torch.float64)
    result = run(MAML(rule, first_order=True), loss_fn, batch, log_rates)

    expected: Params = {n: torch.zeros_like(p) for n, p in loss_fn.weights.parameters().items()}
    of_rates = torch.zeros_like(log_rates)
    for task in range(3):
        fast = {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
        directions = []
        for step in range(3):
            fast = leaves(fast)
            grads = gradients(plain_loss(reference, fast, batch.support.tasks(task, task + 1)), fast)
            directions.append({n: g + momentum * directions[-1][n] if step else g for n, g in grads.items()})
            fast = {n: p - log_rates[step, i].exp() * directions[-1][n] for i, (n, p) in enumerate(fast.items())}
        fast = leaves(fast)
        at_query = gradients(plain_loss(reference, fast, batch.query.tasks(task, task + 1)), fast)
        for i, (n, g) in enumerate(at_query.items()):
            expected[n] += g / 3
            for step in range(3):
                of_rates[step, i] -= log_rates[step, i].exp() * (directions[step][n] * g).sum() / 3
    assert_equal(result.grads.adapter, expected, 1e-10)
    assert_equal(result.grads.hyper, {RATES: of_rates}, 1e-10)


def test_orders_differ_by_the_hessian_term(model, loss_fn):
    """With one step: second order - first order = -rate * (Hessian of the support loss) * (query gradient)."""
    batch, reference, lr = random_batch(), reference_model(model), 0.02
    second = run(MAML(InnerRule(lr=lr, steps=1)), loss_fn, batch).grads.adapter
    first = run(MAML(InnerRule(lr=lr, steps=1), first_order=True), loss_fn, batch).grads.adapter
    expected: Params = {n: torch.zeros_like(p) for n, p in second.items()}
    for task in range(3):
        start = leaves(dict(loss_fn.weights.parameters()))
        grads = gradients(plain_loss(reference, start, batch.support.tasks(task, task + 1)), start, create_graph=True)
        fast = leaves({n: p - lr * grads[n] for n, p in start.items()})
        at_query = gradients(plain_loss(reference, fast, batch.query.tasks(task, task + 1)), fast)
        product = gradients(sum((grads[n] * at_query[n]).sum() for n in grads), start)
        expected = {n: e - lr * product[n] / 3 for n, e in expected.items()}
    assert_equal({n: second[n] - first[n] for n in second}, expected, 1e-10)
    assert max((expected[n] / first[n]).abs().max() for n in first) > 0.1  # a term that counts
