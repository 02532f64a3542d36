"""What holds for every algorithm, whatever it estimates."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from counted import CountedRows
from tiny_models import assert_equal, fingerprint, narrow_loss, random_batch

from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.outer_loop.outer_loop import LearnedRates, assign_gradient, meta_gradient
from meta_peft.outer_loop.schedule import AnyAlgorithm
from meta_peft.params import gradients, leaves
from meta_peft.types import SUPPORT_LOSSES, EpisodeBatch, MetaGradient, Params, Rows

RULE = InnerRule(Adam(eps_root=1e-2), lr=0.02, steps=2, learn_rates=True)
FIXED = InnerRule(SGD(0.5), lr=0.02, steps=2)
ALGORITHMS: dict[str, AnyAlgorithm] = {
    "maml": MAML(RULE),
    "fomaml": MAML(RULE, first_order=True),
    "truncated": MAML(RULE, second_order_steps=1),
    "replay": MAML(RULE, memory="replay"),
    "finite differences": MAML(RULE, memory="finite_differences"),
    "maml++": MAML(InnerRule(SGD(), lr=0.02, steps=2, learn_rates=True, rates_per_step=True), multi_step=0.5),
    "meta-sgd": MAML(InnerRule(SGD(), lr=0.02, steps=2, learn_rates=True, rates_per_entry=True)),
    "anil": MAML(InnerRule(SGD(), lr=0.02, steps=2, learn_rates=True, fast="lora_B")),
    "imaml": ImplicitMAML(InnerRule(lr=0.02, steps=2, proximal=5.0)),
    "imaml, upper layer": ImplicitMAML(InnerRule(lr=0.02, steps=2, proximal=5.0, fast=r"layers\.1\."), "neumann"),
    "imaml, finite differences": ImplicitMAML(InnerRule(lr=0.02, steps=2, proximal=5.0), memory="finite_differences"),
    "reptile": Reptile(FIXED),
    "multitask": MultiTask(FIXED),
}
DIFFERENCES = {
    "finite differences",
    "imaml, finite differences",
}  # their rounding errors differ with the rows of a stack


@cache
def loss_fn() -> AdapterLoss:
    return narrow_loss()


@cache
def batch() -> EpisodeBatch:
    return random_batch(n_tasks=3, support=2, query=1)


@cache
def rates_of(name: str) -> LearnedRates:
    return LearnedRates(ALGORITHMS[name].inner, dict(loss_fn().weights.parameters()))


@cache
def gradient_of(name: str) -> MetaGradient:
    return meta_gradient(loss_fn(), batch(), ALGORITHMS[name], rates_of(name))


def tolerance(name: str) -> float:
    return 1e-6 if name in DIFFERENCES else 1e-12


def all_of(gradient: MetaGradient) -> Params:
    return {**gradient.grads.adapter, **gradient.grads.hyper}


def reordered(rows: Rows, order: list[int]) -> Rows:
    parts = [rows.tasks(t, t + 1) for t in order]
    inputs = {n: torch.cat([p.inputs[n] for p in parts]) for n in rows.inputs}
    return Rows(inputs, torch.cat([p.labels_BL for p in parts]), rows.n_tasks)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_for_every_matrix_in_order_and_for_rates_that_are_learned(name: str):
    found, own = gradient_of(name), loss_fn().weights.parameters()
    assert list(found.grads.adapter) == list(own)
    assert all(g.shape == own[n].shape and g.dtype == own[n].dtype for n, g in found.grads.adapter.items())
    assert all(g.isfinite().all() and (g != 0).any() for g in found.grads.adapter.values())
    learned = ALGORITHMS[name].inner.learn_rates
    assert {n: g.shape for n, g in found.grads.hyper.items()} == (
        {RATES: rates_of(name).log_rates.shape} if learned else {}
    )
    assert all((g != 0).any() for g in found.grads.hyper.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_task_has_a_loss_and_the_number_of_tasks_comes_along(name: str):
    found = gradient_of(name)
    assert found.n_tasks == 3
    assert found.metrics["loss"].shape == (3,)
    assert all(value.shape[0] == 3 and value.isfinite().all() for value in found.metrics.values())
    if name != "multitask":
        assert found.metrics[SUPPORT_LOSSES].shape == (3, ALGORITHMS[name].inner.steps)
    assert len(set(found.metrics["loss"].tolist())) == 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_gradient_and_no_graph_is_left(name: str):
    found = gradient_of(name)
    assert not any(t.requires_grad for t in (*all_of(found).values(), *found.metrics.values()))
    assert all(p.grad is None for p in loss_fn().model.parameters())
    assert rates_of(name).log_rates.grad is None


@pytest.mark.parametrize("name", ALGORITHMS)
def test_does_not_depend_on_the_order_of_the_tasks(name: str):
    order = [2, 0, 1]
    other = EpisodeBatch(reordered(batch().support, order), reordered(batch().query, order), ["c", "a", "b"])
    found, expected = meta_gradient(loss_fn(), other, ALGORITHMS[name], rates_of(name)), gradient_of(name)
    assert_equal(all_of(found), all_of(expected), tolerance(name))
    assert_equal({"loss": found.metrics["loss"]}, {"loss": expected.metrics["loss"][order]}, 1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_does_not_depend_on_tasks_per_forward(name: str):
    """All three, or two and then the one that is left."""
    found = meta_gradient(loss_fn(), batch(), ALGORITHMS[name], rates_of(name), tasks_per_forward=2)
    assert_equal(all_of(found), all_of(gradient_of(name)), tolerance(name))
    assert found.metrics.keys() == gradient_of(name).metrics.keys()
    assert_equal({"loss": found.metrics["loss"]}, {"loss": gradient_of(name).metrics["loss"]}, 1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_batch_twice_gives_the_same_bits(name: str):
    again = meta_gradient(loss_fn(), batch(), ALGORITHMS[name], rates_of(name))
    assert all(torch.equal(p, all_of(gradient_of(name))[n]) for n, p in all_of(again).items())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_is_written_to(name: str):
    """Neither to the base, nor to the adapter, nor to rates or rows; and a gradient can be assigned afterwards."""
    model = loss_fn().model
    before, adapter = fingerprint(model), {n: p.detach().clone() for n, p in loss_fn().weights.parameters().items()}
    rates = rates_of(name).log_rates.detach().clone()
    rows = random_batch(n_tasks=3, support=2, query=1)
    found = meta_gradient(loss_fn(), batch(), ALGORITHMS[name], rates_of(name))
    assert fingerprint(model) == before
    assert_equal({n: p.detach() for n, p in loss_fn().weights.parameters().items()}, adapter, 0)
    assert torch.equal(rates_of(name).log_rates, rates)
    for mine, drawn in ((batch().support, rows.support), (batch().query, rows.query)):
        assert all(torch.equal(mine.inputs[n], drawn.inputs[n]) for n in drawn.inputs)
    assign_gradient(found, loss_fn(), rates_of(name))
    try:
        assert all(torch.equal(p.grad, found.grads.adapter[n]) for n, p in loss_fn().weights.parameters().items())
    finally:
        for parameter in (*model.parameters(), rates_of(name).log_rates):
            parameter.grad = None


@pytest.mark.parametrize("algorithm", [MAML, ImplicitMAML, Reptile, MultiTask])
@pytest.mark.parametrize("inner", [0.1, SGD(), InnerRule, None], ids=["rate", "optimizer", "class", "nothing"])
def test_what_is_no_inner_rule(algorithm, inner):
    """In libraries of tensors a rate is what comes first."""
    with pytest.raises(
        MetaPeftError, match=r"inner must be an InnerRule, .* as in MAML\(InnerRule\(SGD\(\), lr=0.1\)\)"
    ):
        algorithm(inner)


# ---- where nothing adapts


def of_the_query_loss() -> Params:
    adapter = leaves(dict(loss_fn().weights.parameters()))
    return gradients(loss_fn()(adapter, batch().query).mean(), adapter)


@pytest.mark.parametrize("rule", [InnerRule(steps=0), InnerRule(lr=0, steps=2), InnerRule(SGD(0.9), lr=0, steps=2)])
@pytest.mark.parametrize(
    "algorithm",
    [
        MAML,
        lambda rule: MAML(rule, first_order=True),
        lambda rule: MAML(rule, second_order_steps=1, memory="replay"),
        lambda rule: MAML(rule, memory="finite_differences"),
        lambda rule: MAML(rule, multi_step=1.0),
    ],
)
def test_maml_is_then_the_gradient_of_the_query_loss(algorithm, rule: InnerRule):
    found = meta_gradient(loss_fn(), batch(), algorithm(rule))
    assert_equal(found.grads.adapter, of_the_query_loss(), 1e-12)


def test_rates_get_zeros_without_steps():
    rule = InnerRule(steps=0, learn_rates=True)
    found = meta_gradient(loss_fn(), batch(), MAML(rule))
    assert (found.grads.hyper[RATES] == 0).all()
    assert found.grads.hyper[RATES].shape == (1, len(found.grads.adapter))


def test_reptile_is_then_zero():
    found = meta_gradient(loss_fn(), batch(), Reptile(InnerRule(lr=0, steps=2)))
    assert all((g == 0).all() for g in found.grads.adapter.values())


def test_multitask_training_does_not_know_the_inner_rule():
    for rule in (InnerRule(steps=0), InnerRule(lr=0), InnerRule(fast="lora_B", steps=9)):
        found = meta_gradient(loss_fn(), batch(), MultiTask(rule))
        assert_equal(found.grads.adapter, gradient_of("multitask").grads.adapter, 1e-14)


# ---- what it costs


@pytest.mark.parametrize("name", ALGORITHMS)
def test_products_are_those_that_are_computed(name: str):
    """Products of rows with the weight of one layer, counted while a meta-gradient is computed. The last token of the
    longest row predicts nothing, and is left out."""
    weight = loss_fn().model.get_base_model().model.layers[1].self_attn.o_proj.base_layer.weight
    with CountedRows(weight) as counted:
        meta_gradient(loss_fn(), batch(), ALGORITHMS[name], rates_of(name))
    tokens = batch().support.labels_BL.shape[1] - 1
    # Where there are slow layers, the pass that finds what reaches the fast weights goes through all layers.
    more = 2 + 1 if loss_fn().stack(ALGORITHMS[name].inner).slow else 0
    assert counted.rows == (ALGORITHMS[name].products(support=2, query=1) + more) * 3 * tokens


@pytest.mark.parametrize("name", ["maml", "imaml, upper layer"])
def test_a_layer_below_all_fast_weights_costs_less(name: str):
    weight = loss_fn().model.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight
    algorithm = replace(ALGORITHMS[name], inner=replace(ALGORITHMS[name].inner, fast=r"layers\.1\."))
    with CountedRows(weight) as counted:
        meta_gradient(loss_fn(), batch(), algorithm)
    tokens = batch().support.labels_BL.shape[1] - 1
    assert 0 < counted.rows < algorithm.products(support=2, query=1) * 3 * tokens
