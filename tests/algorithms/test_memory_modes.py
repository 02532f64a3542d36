"""MAML through a real model: in every memory mode, with everything that an inner rule can do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from counted import Alive
from derivatives import STENCIL
from tiny_models import (
    assert_equal,
    narrow_loss,
    plain_loss,
    random_batch,
    reference_model,
    repeated,
    tiny,
    tiny_base,
    with_lora,
)
from torch import Tensor

from meta_peft.algorithms import MAML
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.outer_loop.outer_loop import LearnedRates, meta_gradient
from meta_peft.params import gradients, leaves
from meta_peft.types import EpisodeBatch, MetaGradient, Params

LEARNED = {"learn_rates": True}
RULES = {
    "sgd, rates per step": InnerRule(SGD(), lr=0.1, rates_per_step=True, **LEARNED),
    "momentum": InnerRule(SGD(0.9), lr=0.1, **LEARNED),
    "rates per entry": InnerRule(SGD(), lr=0.1, rates_per_entry=True, **LEARNED),
    "adamw": InnerRule(Adam(eps_root=1e-2, weight_decay=0.1), lr=0.1, **LEARNED),
    "clip": InnerRule(SGD(0.9), lr=0.1, clip=0.5),  # shorter than the gradient of every task
    "clip that is never reached": InnerRule(SGD(), lr=0.1, clip=1e3, **LEARNED),
    "proximal": InnerRule(SGD(), lr=0.1, proximal=2.0, **LEARNED),
    "proximal, clip, adam, per entry and step": InnerRule(
        Adam(eps_root=1e-2), lr=0.1, proximal=2.0, clip=0.7, rates_per_entry=True, rates_per_step=True, **LEARNED
    ),
    "B alone": InnerRule(SGD(), lr=0.2, fast="lora_B", **LEARNED),
    "upper layer alone": InnerRule(Adam(eps_root=1e-2), lr=0.1, fast=r"layers\.1\."),
}
RULES = {name: replace(rule, steps=3) for name, rule in RULES.items()}
MULTI_STEP = (0.0, 0.6, 1.0)


@cache
def loss_fn() -> AdapterLoss:
    return narrow_loss()


@cache
def batch() -> EpisodeBatch:
    return random_batch(n_tasks=2, support=2, query=1)


def adapter() -> Params:
    return {n: p.detach() for n, p in loss_fn().weights.parameters().items()}


def rates_of(rule: InnerRule) -> LearnedRates:
    """Rates that all differ, so that a mixed-up index shows."""
    rates = LearnedRates(rule, adapter())
    noise = torch.randn(rates.log_rates.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rates.log_rates.data += 0.3 * noise
    return rates


@cache
def gradient_of(rule: str, multi_step: float = 0.0, memory: str | int = "unrolled") -> MetaGradient:
    algorithm = MAML(RULES[rule], memory=memory, multi_step=multi_step)
    return meta_gradient(loss_fn(), batch(), algorithm, rates_of(RULES[rule]))


def all_of(gradient: MetaGradient) -> Params:
    return {**gradient.grads.adapter, **gradient.grads.hyper}


def bits_of(gradient: MetaGradient) -> dict[str, bytes]:
    return {n: p.numpy().tobytes() for n, p in {**all_of(gradient), **gradient.metrics}.items()}


def vector(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def objectives(rule: InnerRule, multi_step: float, starts: list[Params], hyper: Params) -> list[float]:
    """By `adapt`, which builds no graph: the query loss after the last step, mixed with the mean over all steps.

    All starts go through as one stack.
    """
    n_tasks, losses = batch().n_tasks, []
    stack = {n: torch.stack([s[n] for s in starts for _ in range(n_tasks)]) for n in starts[0]}
    support, query = (repeated(rows, len(starts)) for rows in (batch().support, batch().query))

    def score(step: int, fast: Params) -> None:
        if step == rule.steps or (step and multi_step):
            losses.append(loss_fn().scores(fast, query).loss_T.view(len(starts), n_tasks).mean(1))

    adapt(loss_fn(), stack, hyper, support, rule, after_step=score, stacked=True)
    return ((1 - multi_step) * losses[-1] + multi_step * torch.stack(losses).mean(0)).tolist()


@pytest.mark.parametrize("multi_step", MULTI_STEP)
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_the_slope_of_the_objective(rule: str, multi_step: float):
    """Along one random direction of the fast weights, one of the slow weights, and one of the rates."""
    grads, start = all_of(gradient_of(rule, multi_step)), adapter()
    log_rates = rates_of(RULES[rule]).log_rates.detach()
    generator = torch.Generator().manual_seed(3)
    along = {n: torch.randn(g.shape, generator=generator, dtype=torch.float64) for n, g in grads.items()}
    fast = RULES[rule].fast_names(start)
    of_weights = [part for part in (fast, [n for n in start if n not in fast]) if part]

    h, steps = 1e-4, list(STENCIL)
    starts = [{n: p + k * h * along[n] * (n in part) for n, p in start.items()} for part in of_weights for k in steps]
    found = objectives(RULES[rule], multi_step, starts, {RATES: log_rates})
    for part, values in zip(of_weights, (found[:4], found[4:]), strict=False):
        expected = sum((grads[n] * along[n]).sum().item() for n in part)
        slope = sum(weight * value for weight, value in zip(STENCIL.values(), values, strict=True)) / h
        assert slope == pytest.approx(expected, rel=1e-6), part

    assert (RATES in grads) is RULES[rule].learn_rates
    if RATES in grads:
        rates = [{RATES: log_rates + k * h * along[RATES]} for k in steps]
        values = [objectives(RULES[rule], multi_step, [start], hyper)[0] for hyper in rates]
        slope = sum(weight * value for weight, value in zip(STENCIL.values(), values, strict=True)) / h
        assert slope == pytest.approx((grads[RATES] * along[RATES]).sum().item(), rel=1e-6)


@pytest.mark.parametrize("memory", ["replay", 1, 2])
@pytest.mark.parametrize("multi_step", MULTI_STEP)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_changes_no_bit(rule: str, multi_step: float, memory: str | int):
    assert bits_of(gradient_of(rule, multi_step, memory)) == bits_of(gradient_of(rule, multi_step))


@pytest.mark.parametrize("memory", ["auto", 0, 3, 99])
def test_no_graph_kept_is_replay_and_all_of_them_or_more_unrolled(memory: str | int):
    assert bits_of(gradient_of("momentum", memory=memory)) == bits_of(gradient_of("momentum"))


@pytest.mark.parametrize("multi_step", MULTI_STEP)
@pytest.mark.parametrize("rule", RULES)
def test_finite_differences_are_close_and_say_how_close(rule: str, multi_step: float):
    """`hessian_error` is one to three times the error of one product (see test_hessian), and a gradient takes one product
    for each of its steps. So it is a bound times the number of steps."""
    found, exact = gradient_of(rule, multi_step, "finite_differences"), gradient_of(rule, multi_step)
    assert_equal({"loss": found.metrics["loss"]}, {"loss": exact.metrics["loss"]}, 1e-14)
    error = ((vector(all_of(found)) - vector(all_of(exact))).norm() / vector(all_of(exact)).norm()).item()
    said = found.metrics["hessian_error"]
    assert said.shape == (2,)
    assert "hessian_error" not in exact.metrics
    assert 0 < error < 1e-6
    assert error <= RULES[rule].steps * said.max().item()
    assert said.max().item() < 1e-5


def test_a_clip_that_is_never_reached_is_none_and_one_that_is_counts():
    rule = RULES["clip that is never reached"]
    without = meta_gradient(loss_fn(), batch(), MAML(replace(rule, clip=None)), rates_of(rule))
    assert_equal(all_of(gradient_of("clip that is never reached")), all_of(without), 1e-12)
    clipped, free = RULES["clip"], replace(RULES["clip"], clip=None)
    free = meta_gradient(loss_fn(), batch(), MAML(free), rates_of(clipped))
    assert (vector(all_of(gradient_of("clip"))) - vector(all_of(free))).norm() > 0.1 * vector(all_of(free)).norm()


def test_slow_weights_keep_their_values_and_get_a_gradient():
    """ANIL with LoRA: A is meta-learned, B adapts."""
    rule = RULES["B alone"]
    end = adapt(loss_fn(), adapter(), rates_of(rule).values(), batch().support, rule)
    moved = {n for n, p in end.items() if (p != adapter()[n]).any()}
    assert moved == {n for n in adapter() if "lora_B" in n}
    grads = gradient_of("B alone").grads
    assert list(grads.adapter) == list(adapter())
    assert all((g != 0).any() for g in grads.adapter.values())
    assert grads.hyper[RATES].shape == (1, len(moved))


# ---- the mean of the query losses after every step


def test_multi_step_loss_goes_over_from_the_mean_to_the_last():
    """The gradient is linear in how much of the objective is the mean."""
    last, some, mean = (gradient_of("momentum", multi_step) for multi_step in MULTI_STEP)
    expected = {n: 0.4 * p + 0.6 * all_of(mean)[n] for n, p in all_of(last).items()}
    assert_equal(all_of(some), expected, 1e-12)
    assert_equal(some.metrics, last.metrics, 1e-14)  # the loss that is reported is the one after the last step
    assert (vector(all_of(mean)) - vector(all_of(last))).norm() > 0.1 * vector(all_of(last)).norm()


def test_with_one_step_the_mean_is_the_last():
    rule = replace(RULES["momentum"], steps=1)
    last, mean = (meta_gradient(loss_fn(), batch(), MAML(rule, multi_step=m), rates_of(rule)) for m in (0.0, 1.0))
    assert_equal(all_of(mean), all_of(last), 1e-14)


# ---- truncation


def truncated_by_hand(rule: InnerRule, last: int) -> Params:
    """One task after the other with PEFT's own forward; inner gradients before the `last` steps are constants."""
    reference, own = reference_model(loss_fn().model), leaves(adapter())
    log_rates = rates_of(rule).log_rates.detach().requires_grad_()
    losses = []
    for task in range(batch().n_tasks):
        support, query = (rows.tasks(task, task + 1) for rows in (batch().support, batch().query))
        at, velocity = own, dict.fromkeys(own, 0)
        for step in range(rule.steps):
            point = at if rule.steps - step <= last else leaves(at)
            grads = gradients(plain_loss(reference, point, support), point, create_graph=True)
            if point is not at:
                grads = {n: g.detach() for n, g in grads.items()}
            velocity = {n: rule.optimizer.momentum * velocity[n] + g for n, g in grads.items()}
            at = {n: p - log_rates[0, i].exp() * velocity[n] for i, (n, p) in enumerate(at.items())}
        losses.append(plain_loss(reference, at, query))
    return gradients(torch.stack(losses).mean(), {**own, RATES: log_rates})


@pytest.mark.parametrize("memory", ["unrolled", "replay", 1])
@pytest.mark.parametrize("last", [1, 2])
def test_truncation_differentiates_the_last_steps_alone(last: int, memory: str | int):
    rule = RULES["momentum"]
    algorithm = MAML(rule, second_order_steps=last, memory=memory)
    found = all_of(meta_gradient(loss_fn(), batch(), algorithm, rates_of(rule)))
    assert_equal(found, truncated_by_hand(rule, last), 1e-11)
    first_order = all_of(meta_gradient(loss_fn(), batch(), MAML(rule, first_order=True), rates_of(rule)))
    for other in (first_order, all_of(gradient_of("momentum"))):
        assert (vector(found) - vector(other)).norm() > 0.02 * vector(other).norm()


@pytest.mark.parametrize("rule", ["rates per entry", "adamw", "clip", "B alone"])
def test_truncation_goes_from_first_order_to_the_whole(rule: str):
    rates = rates_of(RULES[rule])
    first_order = meta_gradient(loss_fn(), batch(), MAML(RULES[rule], first_order=True), rates)
    for algorithm in (
        MAML(RULES[rule], second_order_steps=0),
        MAML(RULES[rule], second_order_steps=0, memory="replay"),
    ):
        assert not algorithm.second_order
        assert bits_of(meta_gradient(loss_fn(), batch(), algorithm, rates)) == bits_of(first_order)
    for steps in (3, 99):
        whole = meta_gradient(loss_fn(), batch(), MAML(RULES[rule], second_order_steps=steps), rates)
        assert bits_of(whole) == bits_of(gradient_of(rule))


# ---- memory


@cache
def most_alive(memory: str | int, steps: int, **options: Any) -> int:
    """Bytes that autograd has saved and not freed, at most, for one small task."""
    small, its_batch = smaller()
    algorithm = MAML(InnerRule(Adam(eps_root=1e-2), lr=0.02, steps=steps), memory=memory, **options)
    with Alive() as alive:
        meta_gradient(small, its_batch, algorithm)
    assert alive.now == 0
    return alive.most


@cache
def smaller() -> tuple[AdapterLoss, EpisodeBatch]:
    return AdapterLoss(tiny("llama", width=8)), random_batch(n_tasks=1, support=2, query=1)


def test_memory_does_not_grow_with_the_steps_unless_all_graphs_are_kept():
    few, many = (most_alive("unrolled", steps) for steps in (2, 8))
    assert 3 * few < many < 4 * few
    for memory in ("replay", 0, 1, "finite_differences"):
        few, many = (most_alive(memory, steps) for steps in (2, 8))
        assert 0.95 * few < many < 1.05 * few, memory
    few, many = (most_alive("unrolled", steps, second_order_steps=1) for steps in (2, 8))
    assert 0.95 * few < many < 1.05 * few


def test_memory_grows_with_the_graphs_that_are_kept():
    unrolled, replayed = most_alive("unrolled", 8), most_alive("replay", 8)
    kept = [most_alive(graphs, 8) for graphs in (1, 2, 4, 8)]
    assert kept[0] == pytest.approx(replayed, rel=0.1)
    assert kept[3] == unrolled
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert kept[3] - kept[2] == pytest.approx(4 * (kept[1] - kept[0]), rel=0.1)  # each graph takes as much
    assert most_alive("finite_differences", 8) < replayed


@pytest.mark.parametrize("memory", ["unrolled", "replay"])
def test_layers_below_the_adapter_keep_nothing(memory: str):
    """As much is saved with three layers below the adapted one as with none."""
    found = []
    for layers in (1, 4):
        model = with_lora(tiny_base("llama", layers=layers, width=8), layers_to_transform=[layers - 1])
        with Alive() as alive:
            meta_gradient(AdapterLoss(model), smaller()[1], MAML(InnerRule(lr=0.02, steps=3), memory=memory))
        found.append(alive.most)
    assert found[1] == pytest.approx(found[0], rel=0.02)
