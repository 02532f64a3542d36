"""The walk back through the inner loop, against autograd through all of it, and what it keeps on the way."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
from counted import Alive
from tiny_models import assert_equal
from torch import Tensor
from toys import network, network_problem

from meta_peft.inner_loop.inner_loop import adapt, start
from meta_peft.inner_loop.inner_path import Adjoint, InnerPath, Remember
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.params import gradients, leaves
from meta_peft.types import Meta, Params, Rows

RULES = {
    "sgd": InnerRule(SGD(), lr=0.1, learn_rates=True, rates_per_step=True),
    "momentum, a rate for each entry": InnerRule(SGD(0.9), lr=0.1, learn_rates=True, rates_per_entry=True),
    "momentum, fixed rates": InnerRule(SGD(0.9), lr=0.1),
    "adamw": InnerRule(Adam(eps_root=1e-2, weight_decay=0.1), lr=0.1, learn_rates=True),
    "adamw, fixed rates": InnerRule(Adam(eps_root=1e-2, weight_decay=0.1), lr=0.1),
    "clipped": InnerRule(SGD(0.9), lr=0.1, clip=0.5, learn_rates=True),
    "not clipped": InnerRule(SGD(0.9), lr=0.1, clip=1e3),
    "proximal": InnerRule(SGD(), lr=0.1, proximal=2.0),
    "proximal, clipped adam": InnerRule(Adam(eps_root=1e-2), lr=0.1, proximal=2.0, clip=0.7, learn_rates=True),
    "B alone": InnerRule(SGD(), lr=0.1, fast="b", learn_rates=True),
}
STEPS = 4


class Counted:
    """The loss, and how often it was computed; with gradients to weights alone."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        self.calls += 1
        return network(adapter, rows)


@pytest.fixture(params=RULES)
def rule(request) -> InnerRule:
    return replace(RULES[request.param], steps=STEPS)


def problem(rule: InnerRule) -> tuple[Meta, Rows]:
    adapter, batch = network_problem()
    hyper = rule.initial_rates(adapter)
    noise = torch.randn(hyper[RATES].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Meta(adapter, {RATES: hyper[RATES] + 0.3 * noise}), batch.support


def adjoints(path: InnerPath) -> tuple[Params, Params]:
    g = torch.Generator().manual_seed(3)
    return tuple(
        {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in part.items()}
        for part in (path.fast, path.slow)
    )


def walked(rule: InnerRule, remember: Remember, arriving=None) -> tuple[Params, Params, Params]:
    meta, support = problem(rule)
    path = InnerPath(network, meta, support, rule, remember)
    adjoint = Adjoint(*adjoints(path))
    path.walk_back(adjoint, arriving)
    return adjoint.fast, adjoint.slow, adjoint.hyper


def by_autograd(rule: InnerRule, second_order_steps: int) -> tuple[Params, Params, Params]:
    """The loop unrolled, with inner gradients of the steps before as constants; one backward through all of it."""
    meta, support = problem(rule)
    fast, slow = (leaves(part) for part in start(meta.adapter, rule, support.n_tasks))
    hyper = leaves(meta.hyper)
    at, state = fast, rule.init(fast)
    for k in range(rule.steps):
        differentiated = rule.steps - k <= second_order_steps
        point = at if differentiated else leaves(at)
        grads = gradients(network({**slow, **point}, support).sum(), point, create_graph=differentiated)
        at, state = rule.step(k, at, grads, state, hyper)
    path = InnerPath(network, meta, support, rule, Remember(0, 0))
    of_fast, of_slow = adjoints(path)
    end = sum((at[n] * of_fast[n]).sum() for n in at) + sum((slow[n] * of_slow[n]).sum() for n in slow)
    found = gradients(end, {**fast, **{f"slow {n}": p for n, p in slow.items()}, **hyper})
    return {n: found[n] for n in fast}, {n: found[f"slow {n}"] for n in slow}, {n: found[n] for n in hyper}


@pytest.mark.parametrize("second_order_steps", [0, 1, 3, STEPS])
def test_adjoints_are_those_of_autograd(rule: InnerRule, second_order_steps: int):
    found = walked(rule, Remember(second_order_steps, graphs=STEPS))
    expected = by_autograd(rule, second_order_steps)
    assert_equal(found[0], expected[0], 1e-12)
    assert_equal(found[1], expected[1], 1e-12)
    assert_equal(found[2], expected[2] if rule.learn_rates else {}, 1e-12)


@pytest.mark.parametrize("second_order_steps", [0, 1, STEPS])
def test_graphs_that_are_rebuilt_change_no_bit(rule: InnerRule, second_order_steps: int):
    kept = walked(rule, Remember(second_order_steps, graphs=STEPS))
    for graphs in range(STEPS):
        for a, b in zip(walked(rule, Remember(second_order_steps, graphs)), kept, strict=True):
            assert list(a) == list(b)
            assert all(torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("second_order_steps", [1, STEPS])
def test_differences_come_close(rule: InnerRule, second_order_steps: int):
    exact = walked(rule, Remember(second_order_steps, graphs=STEPS))
    for a, b in zip(walked(rule, Remember(second_order_steps, 0, differences=True)), exact, strict=True):
        assert_equal(a, b, 1e-6)


def test_the_loop_goes_where_adapt_goes(rule: InnerRule):
    meta, support = problem(rule)
    end = adapt(network, meta.adapter, meta.hyper, support, rule)
    for remember in (Remember(STEPS, STEPS), Remember(STEPS, 0), Remember(0, 0), Remember(STEPS, 0, differences=True)):
        path = InnerPath(network, meta, support, rule, remember)
        assert {**path.fast, **path.slow}.keys() == end.keys()
        assert all(torch.equal(p, end[n]) for n, p in path.fast.items())
        assert all(torch.equal(p, meta.adapter[n]) for n, p in path.slow.items())
        assert (path.slow == {}) is (rule.fast is None)


@pytest.mark.parametrize(
    ("remember", "losses"),
    [
        (Remember(STEPS, STEPS), STEPS),
        (Remember(STEPS, 0), 2 * STEPS),
        (Remember(STEPS, 1), 2 * STEPS - 1),
        (Remember(2, 0), STEPS + 2),
        (Remember(2, 5), STEPS),
        (Remember(0, 0), STEPS),
        (Remember(STEPS, 0, differences=True), 3 * STEPS + 2),  # two more for the error of one product
    ],
)
def test_how_often_the_loss_is_computed(remember: Remember, losses: int):
    rule = replace(RULES["sgd"], steps=STEPS)
    (meta, support), counted = problem(rule), Counted()
    path = InnerPath(counted, meta, support, rule, remember)
    assert counted.calls == STEPS
    assert len([step for step in path._steps if step.graph]) == min(remember.graphs, remember.second_order_steps)
    path.walk_back(Adjoint(*adjoints(path)))
    assert counted.calls == losses
    assert path._steps == []


def test_steps_that_change_no_adjoint_are_not_remembered():
    rule = replace(RULES["momentum, fixed rates"], steps=STEPS)
    meta, support = problem(rule)
    assert len(InnerPath(network, meta, support, rule, Remember(0, 0))._steps) == 0
    assert len(InnerPath(network, meta, support, rule, Remember(1, 0))._steps) == 1
    assert len(InnerPath(network, meta, support, rule, Remember(0, 0, stops=True))._steps) == STEPS
    for name in ("sgd", "adamw, fixed rates", "proximal"):
        rule = replace(RULES[name], steps=STEPS)
        assert len(InnerPath(network, problem(rule)[0], support, rule, Remember(0, 0))._steps) == STEPS


@pytest.mark.parametrize("remember", [Remember(STEPS, STEPS, stops=True), Remember(1, 0, stops=True)])
def test_it_stops_at_every_step_between_for_what_arrives_there(rule: InnerRule, remember: Remember):
    """In reverse order, at the weights that the loop had there; what is given is added."""
    meta, support = problem(rule)
    seen: dict[int, Params] = {}
    adapt(network, meta.adapter, meta.hyper, support, rule, after_step=lambda k, at: seen.update({k: at}))
    stops: list[int] = []

    def arriving(k: int, fast: Params) -> tuple[Params, Params]:
        stops.append(k)
        assert all(torch.equal(p, seen[k][n]) for n, p in fast.items())
        _, slow = start(meta.adapter, rule, support.n_tasks)
        ones = ({n: torch.full_like(p, k) for n, p in part.items()} for part in (fast, slow))
        return next(ones), next(ones)

    found, without = walked(rule, remember, arriving), walked(rule, remember)
    assert stops == [3, 2, 1]
    for n, p in without[1].items():
        assert (found[1][n] != p).any()
    if remember.second_order_steps == 1 and rule.passes_adjoints_on:  # then what is added arrives as it is
        assert_equal(found[0], {n: p + 6 for n, p in without[0].items()}, 1e-12)
        assert_equal(found[1], {n: p + 6 for n, p in without[1].items()}, 1e-12)


def test_the_error_of_differences_is_known_only_where_they_are_taken():
    rule = replace(RULES["sgd"], steps=STEPS)
    meta, support = problem(rule)
    for remember, known in ((Remember(STEPS, 0), False), (Remember(STEPS, 0, differences=True), True)):
        path = InnerPath(network, meta, support, rule, remember)
        path.walk_back(Adjoint(*adjoints(path)))
        assert (path.difference_error_T is not None) is known
    assert path.difference_error_T.shape == (3,)
    assert (path.difference_error_T < 1e-6).all()


def test_without_steps_adjoints_arrive_as_they_are():
    rule = replace(RULES["sgd"], steps=0)
    meta, support = problem(rule)
    path = InnerPath(network, meta, support, rule, Remember(0, 0))
    of_fast, of_slow = adjoints(path)
    adjoint = Adjoint(of_fast, of_slow)
    path.walk_back(adjoint)
    assert (adjoint.fast, adjoint.slow, adjoint.hyper) == (of_fast, of_slow, {})


class Failing(Counted):
    """A loss that fails when it is computed for the `at`-th time."""

    def __init__(self, at: int):
        super().__init__()
        self._at = at

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        if self.calls == self._at:
            raise torch.OutOfMemoryError("no more")
        return super().__call__(adapter, rows)


@pytest.mark.parametrize("graphs", range(STEPS + 1))
def test_a_loop_that_failed_holds_on_to_nothing(graphs: int):
    """At whichever step, there or back; without the garbage collector, which may come too late."""
    rule = replace(RULES["momentum, a rate for each entry"], steps=STEPS)
    meta, support = problem(rule)

    def attempt(loss_fn: Failing) -> None:
        path = InnerPath(loss_fn, meta, support, rule, Remember(STEPS, graphs))
        path.walk_back(Adjoint(*adjoints(path)))

    gc.collect()
    gc.disable()
    try:
        for at in range(2 * STEPS - graphs):
            with Alive() as alive, contextlib.suppress(torch.OutOfMemoryError):
                attempt(Failing(at))
            assert alive.now == 0
            assert alive.most > 0 or at <= STEPS - graphs
    finally:
        gc.enable()
