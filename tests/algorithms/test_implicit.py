"""Implicit MAML, against the closed form on quadratics and against the slope of the true solution on a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from counted import Alive
from derivatives import STENCIL
from tiny_models import assert_equal, random_batch, repeated, tiny
from torch import Tensor
from toys import network, network_problem, quadratic, quadratic_problem

from meta_peft.algorithms import ImplicitMAML
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.types import EpisodeBatch, Meta, MetaGradient, Params


@pytest.mark.parametrize("memory", ["auto", "finite_differences"])
@pytest.mark.parametrize(("solver", "iterations"), [("cg", 7), ("neumann", 80)])
@pytest.mark.parametrize("strength", [3.0, 10.0])
def test_closed_form_on_a_quadratic(solver: str, iterations: int, strength: float, memory: str):
    """The minimum is the mean of centre and start, weighted by curvature and strength. As many iterations of conjugate
    gradients as a task has entries solve the system exactly."""
    adapter, batch = quadratic_problem()
    rule = InnerRule(lr=1 / (strength + 1), steps=80, proximal=strength)
    algorithm = ImplicitMAML(rule, solver, iterations, memory)
    result = algorithm(quadratic, Meta(adapter, rule.initial_rates(adapter)), batch)
    h, c = batch.support.inputs["curvature"], batch.support.inputs["centre"]
    end = (h * c + strength * adapter["w"]) / (h + strength)
    at_query = batch.query.inputs["curvature"] * (end - batch.query.inputs["centre"])
    loss_T = (at_query * (end - batch.query.inputs["centre"]) / 2).sum((1, 2))
    expected = (strength / (h + strength) * at_query).mean(0)
    tolerance = 1e-12 if memory == "auto" else 1e-8
    assert_equal({"w": result.grads.adapter["w"]}, {"w": expected}, tolerance)
    assert (result.grads.adapter["unused"] == 0).all()
    assert_equal({"loss": result.metrics["loss"]}, {"loss": loss_T}, 1e-12)
    assert (result.metrics["residual"] < tolerance).all()
    assert result.grads.hyper == {}


def test_fewer_iterations_are_exact_where_curvatures_are_few():
    """Conjugate gradients take one iteration for each different curvature, and none more change anything."""
    adapter, batch = quadratic_problem()
    batch.support.inputs["curvature"].fill_(0.8)
    rule = InnerRule(lr=0.2, steps=100, proximal=3.0)
    found = [
        ImplicitMAML(rule, "cg", iterations)(quadratic, Meta(adapter, rule.initial_rates(adapter)), batch)
        for iterations in (2, 9)
    ]
    assert all((result.metrics["residual"] < 1e-14).all() for result in found)
    assert_equal(found[1].grads.adapter, found[0].grads.adapter, 1e-13)


# ---- on a model. Its curvature is from -9 to 12 where the inner loop ends, so that every step is less than half as far
# from the minimum as the one before.

STRENGTH = 20.0
RULES = {
    "all": InnerRule(SGD(), lr=1 / 22, steps=24, proximal=STRENGTH),
    "upper layer": InnerRule(SGD(), lr=1 / 22, steps=24, proximal=STRENGTH, fast=r"layers\.1\."),
    "B": InnerRule(SGD(), lr=1 / 22, steps=24, proximal=STRENGTH, fast="lora_B"),
}


@cache
def loss_fn() -> AdapterLoss:
    return AdapterLoss(tiny("llama", layers=2, width=8))


@cache
def batch() -> EpisodeBatch:
    return random_batch(n_tasks=2, support=2, query=1)


def adapter() -> Params:
    return {n: p.detach() for n, p in loss_fn().weights.parameters().items()}


@cache
def gradient_of(rule: str, solver: str, iterations: int, memory: str = "auto") -> MetaGradient:
    return meta_gradient(loss_fn(), batch(), ImplicitMAML(RULES[rule], solver, iterations, memory))


def vector(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_the_slope_of_the_true_solution(rule: str):
    """Of the query loss where the inner loop has arrived; along fast and along slow weights."""
    found, inner = gradient_of(rule, "cg", 12), RULES[rule]
    assert (found.metrics["residual"] < 1e-8).all()
    hyper, generator = inner.initial_rates(adapter()), torch.Generator().manual_seed(3)
    along = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in adapter().items()}
    fast = inner.fast_names(adapter())
    parts = [part for part in (fast, [n for n in along if n not in fast]) if part]
    h = 4e-4
    starts = [{n: p + k * h * along[n] * (n in part) for n, p in adapter().items()} for part in parts for k in STENCIL]
    stack = {n: torch.stack([s[n] for s in starts for _ in range(2)]) for n in along}
    support, query = (repeated(rows, len(starts)) for rows in (batch().support, batch().query))
    end = adapt(loss_fn(), stack, hyper, support, inner, stacked=True)
    values = loss_fn().scores(end, query).loss_T.view(len(parts), len(STENCIL), 2).mean(-1)
    slopes = values @ torch.tensor(list(STENCIL.values()), dtype=torch.float64) / h
    for part, slope in zip(parts, slopes.tolist(), strict=True):
        expected = sum((found.grads.adapter[n] * along[n]).sum().item() for n in part)
        assert slope == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_solvers_agree(rule: str):
    by_cg, by_series = gradient_of(rule, "cg", 14), gradient_of(rule, "neumann", 40)
    assert_equal(by_cg.grads.adapter, by_series.grads.adapter, 1e-10)


@pytest.mark.parametrize(("solver", "iterations"), [("cg", 1), ("cg", 3), ("neumann", 1), ("neumann", 4)])
@pytest.mark.parametrize("rule", ["all", "upper layer"])
def test_the_residual_bounds_the_error(rule: str, solver: str, iterations: int):
    """The system is ``I + H / strength``, and H has no eigenvalue below minus half the strength: its inverse is at most 2.
    The error of a task's solution is then at most twice its residual times the length of its query gradient."""
    exact, found = gradient_of(rule, "cg", 14), gradient_of(rule, solver, iterations)
    fast = RULES[rule].fast_names(adapter())
    error, length = (
        vector({n: exact.grads.adapter[n] - other[n] for n in fast}).norm()
        for other in (found.grads.adapter, dict.fromkeys(fast, 0))
    )
    residual = found.metrics["residual"].max()
    assert 0 < error < 2 * residual * 2 * length  # the mean over tasks is shorter than the longest of them
    assert residual < 0.6


@pytest.mark.parametrize("rule", RULES)
def test_differences_in_the_place_of_graphs_are_close(rule: str):
    exact, found = gradient_of(rule, "cg", 12), gradient_of(rule, "cg", 12, "finite_differences")
    assert_equal(found.grads.adapter, exact.grads.adapter, 1e-5)
    assert (vector(found.grads.adapter) - vector(exact.grads.adapter)).norm() < 1e-6 * vector(
        exact.grads.adapter
    ).norm()


def test_the_inner_loop_has_arrived():
    ends = [adapt(loss_fn(), adapter(), RULES["all"].initial_rates(adapter()), batch().support, RULES["all"], steps=k)
            for k in (24, 40)]  # fmt: skip
    assert_equal(ends[0], ends[1], 1e-7)


def test_it_does_not_depend_on_the_path():
    """Another optimizer with another rate arrives at the same minimum, and the gradient is the same."""
    start, rows = network_problem()
    found = []
    for optimizer, lr, steps in ((SGD(), 0.1, 100), (SGD(0.5), 0.05, 200), (Adam(eps_root=1e-3), 0.01, 1000)):
        rule = InnerRule(optimizer, lr=lr, steps=steps, proximal=5.0)
        found.append(ImplicitMAML(rule, "cg", 12)(network, Meta(start, rule.initial_rates(start)), rows))
    for other in found[1:]:
        assert_equal(other.grads.adapter, found[0].grads.adapter, 1e-8)
        assert_equal({"loss": other.metrics["loss"]}, {"loss": found[0].metrics["loss"]}, 1e-8)


def test_memory_does_not_grow_with_the_steps():
    def most(steps: int, memory: str) -> int:
        algorithm = ImplicitMAML(replace(RULES["all"], steps=steps), "cg", 2, memory)
        with Alive() as alive:
            meta_gradient(loss_fn(), batch(), algorithm)
        assert alive.now == 0
        return alive.most

    for memory in ("auto", "finite_differences"):
        assert most(9, memory) == pytest.approx(most(1, memory), rel=0.02)
    assert most(1, "finite_differences") < 0.8 * most(1, "auto")


def test_a_strong_pull_leaves_the_gradient_of_the_query_loss():
    adapter_, batch_ = network_problem()
    rule = InnerRule(lr=1e-9, steps=20, proximal=1e9)
    found = ImplicitMAML(rule)(network, Meta(adapter_, rule.initial_rates(adapter_)), batch_)
    start = {n: p.clone().requires_grad_() for n, p in adapter_.items()}
    expected = torch.autograd.grad(network(start, batch_.query).mean(), list(start.values()))
    assert_equal(found.grads.adapter, dict(zip(start, expected, strict=True)), 1e-7)


RULE = RULES["all"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": InnerRule()}, "needs the pull towards the start: set proximal (lambda) above 0"),
        ({"inner": replace(RULE, learn_rates=True)}, "no gradient for the inner rates: set learn_rates=False"),
        ({"inner": replace(RULE, optimizer=Adam(weight_decay=0.1))}, "weight decay leads: set inner_weight_decay to 0"),
        ({"inner": RULE, "solver": "lu"}, "solver must be one of cg, neumann; got 'lu'"),
        ({"inner": RULE, "iterations": 0}, "iterations must be 1 or more, got 0"),
        ({"inner": RULE, "memory": "differences"}, "memory must be one of auto, unrolled, replay, finite_differences"),
        ({"inner": RULE, "memory": -1}, "or a number of inner steps; got -1"),
        ({"inner": RULE, "memory": None}, "or a number of inner steps; got None"),
        ({"inner": RULE, "iterations": 1.5}, "iterations must be 1 or more, got 1.5: a whole number"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str):
    with pytest.raises(MetaPeftError) as error:
        ImplicitMAML(**options)
    assert message in str(error.value)


def test_second_order_is_asked_of_the_loss_unless_differences_are_taken():
    assert ImplicitMAML().second_order
    assert ImplicitMAML(memory="replay").second_order
    assert not ImplicitMAML(memory="finite_differences").second_order
