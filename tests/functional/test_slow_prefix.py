"""What lies below the fast weights run once: the same meta-gradient, from fewer runs of the layers there."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, base_of, batch_for, lora
from kinds import peft_model
from prefixes import HEAD_ALONE, assert_same, count_runs, with_head
from tiny_models import assert_equal, random_batch, randomise, tiny_base, with_lora

from meta_peft.algorithms import MAML, ImplicitMAML
from meta_peft.evaluation.evaluate import Curve, Start, curve
from meta_peft.frozen.prefix import PLAIN_STACKS
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import Adam, InnerRule
from meta_peft.outer_loop.memory_plan import MemoryPlan
from meta_peft.outer_loop.outer_loop import LearnedRates, meta_gradient
from meta_peft.types import Stack

LAST = {"t5": r"decoder\.block\.2\.", "whisper": r"decoder\.layers\.2\."}
RULE = InnerRule(lr=0.02, steps=3, learn_rates=True, fast=r"\.2\.")
HEADS = ("bert", "head of a decoder")


def all_layers_every_time(loss_fn: AdapterLoss) -> AdapterLoss:
    loss_fn.above = lambda fast: None  # type: ignore[method-assign]
    loss_fn.holding = lambda fast, rows: nullcontext()  # type: ignore[method-assign]
    return loss_fn


def adapted_everywhere(kind: str) -> AdapterLoss:
    return AdapterLoss(lora(base_of(kind, layers=3), ARCHITECTURES[kind].targets).train())


@pytest.mark.parametrize("kind", sorted(PLAIN_STACKS))
def test_the_same_meta_gradient_from_fewer_runs(kind: str):
    algorithm = MAML(replace(RULE, fast=LAST.get(kind, RULE.fast)))
    once, every_time = adapted_everywhere(kind), all_layers_every_time(adapted_everywhere(kind))
    counts, all_counts = count_runs(once), count_runs(every_time)
    batch = batch_for(once.model.get_base_model())
    assert_same(meta_gradient(once, batch, algorithm), meta_gradient(every_time, batch, algorithm))
    # Below once for the support rows and once for the query rows; the last layer then for 3 inner steps and the query.
    assert counts[-1] == [2, 2, 2 + 4]
    assert all_counts[-1] == [4, 4, 4]
    if len(counts) > 1:
        assert counts[0] == [2, 2, 2]
    assert once.stack(algorithm.inner) == Stack(3 * len(counts), 0, 3 * len(counts) - 1)


@pytest.mark.parametrize(
    "algorithm",
    [
        MAML(RULE, memory="replay"),
        MAML(RULE, memory=1),
        MAML(RULE, second_order_steps=1),
        MAML(RULE, first_order=True),
        MAML(RULE, multi_step=0.5),
        MAML(replace(RULE, optimizer=Adam(), rates_per_step=True, clip=0.1)),
        MAML(replace(RULE, fast=r"\.2\..*lora_B")),  # slow weights also beside the fast ones
        ImplicitMAML(InnerRule(lr=0.02, steps=2, proximal=5.0, fast=r"\.2\.")),
        ImplicitMAML(InnerRule(lr=0.02, steps=2, proximal=5.0, fast=r"\.2\."), memory="finite_differences"),
        MAML(RULE, memory="finite_differences"),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_same_for_every_algorithm(algorithm: Any, checkpoint: bool):
    def made() -> AdapterLoss:
        return AdapterLoss(adapted_everywhere("llama").model, checkpoint=checkpoint)

    batch = random_batch(n_tasks=3)
    once, every_time = made(), all_layers_every_time(made())
    counts = count_runs(once)
    found = meta_gradient(once, batch, algorithm, tasks_per_forward=2)
    assert counts[0][0] == 2 * 2 * (1 + checkpoint)  # two chunks, support and query, and again in backward
    # The difference steps are as wide as their rounding errors, which differ with the order of sums.
    rtol = 1e-6 if algorithm.memory == "finite_differences" else 1e-11
    assert_same(found, meta_gradient(every_time, batch, algorithm, tasks_per_forward=2), rtol)


@pytest.mark.parametrize("kind", HEADS)
def test_with_the_head_alone_every_layer_runs_once(kind: str):
    (once, batch), (every_time, _) = with_head(kind), with_head(kind)
    counts, algorithm = count_runs(once), MAML(HEAD_ALONE)
    assert_same(
        meta_gradient(once, batch, algorithm), meta_gradient(all_layers_every_time(every_time), batch, algorithm)
    )
    assert counts == [[2, 2]]
    assert once.stack(HEAD_ALONE) == Stack(2, 0, 2)


@pytest.mark.parametrize("kind", HEADS)
def test_the_whole_meta_gradient_by_finite_differences(kind: str):
    loss_fn, batch = with_head(kind)
    algorithm, weights = MAML(HEAD_ALONE), loss_fn.weights.parameters()
    rates = LearnedRates(HEAD_ALONE, dict(weights))
    rates.log_rates.data = rates.log_rates.data.double()
    found = meta_gradient(loss_fn, batch, algorithm, rates)
    g = torch.Generator().manual_seed(0)
    along = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in weights.items()}
    of_rates = torch.randn(rates.log_rates.shape, generator=g, dtype=torch.float64)

    def objective(width: float) -> float:
        moved = {n: p.detach() + width * along[n] for n, p in weights.items()}
        hyper = {"log_rates": rates.log_rates.detach() + width * of_rates}
        fast = adapt(all_layers_every_time(loss_fn), moved, hyper, batch.support, HEAD_ALONE)
        return float(loss_fn(fast, batch.query).mean())

    h = 1e-5
    expected = (objective(h) - objective(-h)) / (2 * h)
    mine = sum(float((found.grads.adapter[n] * along[n]).sum()) for n in along)
    mine += float((found.grads.hyper["log_rates"] * of_rates).sum())
    assert mine == pytest.approx(expected, rel=1e-6)
    assert all(bool(g.abs().max() > 0) for g in found.grads.adapter.values())


def test_adapting_runs_what_lies_below_once():
    once, every_time = adapted_everywhere("llama"), all_layers_every_time(adapted_everywhere("llama"))
    counts, batch = count_runs(once), random_batch(n_tasks=2)
    adapter, seen = once.own(), []
    hyper = RULE.initial_rates(adapter)
    rule = RULE
    fast = adapt(once, adapter, hyper, batch.support, rule, steps=5, after_step=lambda k, w: seen.append(len(w)))
    assert counts == [[1, 1, 5]]
    assert seen == [len(adapter)] * 6
    assert_equal(fast, adapt(every_time, adapter, hyper, batch.support, rule, steps=5), 1e-12)
    other = {n: 2 * p for n, p in adapter.items()}  # the same rows from another start
    assert_equal(
        adapt(once, other, hyper, batch.support, rule), adapt(every_time, other, hyper, batch.support, rule), 1e-12
    )


def test_a_model_that_takes_one_task_at_a_time():
    """LoRA on an embedding cannot be stacked; that is found out on the way, and everything runs every time."""

    def made() -> AdapterLoss:
        return AdapterLoss(with_lora(tiny_base("llama", layers=3), target_modules=["embed_tokens", "q_proj"]))

    algorithm, batch = MAML(replace(RULE, fast=r"\.2\.|embed")), random_batch(n_tasks=2)
    assert_same(meta_gradient(made(), batch, algorithm), meta_gradient(all_layers_every_time(made()), batch, algorithm))


def test_slow_weights_of_an_embedding_lie_below_all_layers():
    """They are in none of them, so nothing is run once, and they get their gradient."""

    def made() -> AdapterLoss:
        return AdapterLoss(with_lora(tiny_base("llama", layers=3), target_modules=["embed_tokens", "q_proj"]))

    algorithm, batch = MAML(RULE), random_batch(n_tasks=2)
    loss_fn = made()
    assert loss_fn.stack(RULE).slow == 0
    found = meta_gradient(loss_fn, batch, algorithm)
    assert_same(found, meta_gradient(all_layers_every_time(made()), batch, algorithm))
    assert all(bool(g.any()) for n, g in found.grads.adapter.items() if "embed" in n)


def test_slow_weights_of_the_output_lie_above():
    def made() -> AdapterLoss:
        return AdapterLoss(with_lora(tiny_base("llama", layers=3), target_modules=["lm_head", "q_proj"]))

    algorithm, batch, loss_fn = MAML(RULE), random_batch(n_tasks=2), made()
    found = meta_gradient(loss_fn, batch, algorithm)
    assert_same(found, meta_gradient(all_layers_every_time(made()), batch, algorithm))
    assert all(bool(g.any()) for n, g in found.grads.adapter.items() if "lm_head" in n)


def test_evaluation_runs_what_lies_below_once():
    """For the rows that are learned from, and for those that are judged after each number of steps."""
    once, every_time = adapted_everywhere("llama"), all_layers_every_time(adapted_everywhere("llama"))
    counts, batches = count_runs(once), [random_batch(n_tasks=2), random_batch(n_tasks=2, seed=1)]

    def measured(loss_fn: AdapterLoss) -> Curve:
        own = loss_fn.own()
        return curve(loss_fn, Start("mine", own, RULE.initial_rates(own), RULE), batches, [0, 1, 3])

    found, expected = measured(once), measured(every_time)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
    assert len(np.unique(found.loss)) == found.loss.size
    assert counts == [[4, 4, 2 * (3 + 3)]]
    assert not once._held


def test_adapting_where_tasks_go_apart_on_the_way():
    """OPT's feed-forward layers see flattened rows, which the first inner step finds out."""

    def made() -> AdapterLoss:
        return AdapterLoss(lora(base_of("opt", layers=3), ("fc1",)).train())

    once, batch = made(), batch_for(made().model.get_base_model())
    adapter = once.own()
    fast = adapt(once, adapter, RULE.initial_rates(adapter), batch.support, RULE)
    plain = adapt(all_layers_every_time(made()), adapter, RULE.initial_rates(adapter), batch.support, RULE)
    assert_equal(fast, plain, 1e-12)


@pytest.mark.parametrize("plan", [None, MemoryPlan(budget=1e9)])
def test_rows_that_a_model_rearranges(monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan | None):
    """Found out in the first inner step of training, or when its memory is planned: the tasks go apart, with the same
    result."""
    from meta_peft.functional.task_rows import RowsRearrangedError

    loss_fn, batch = adapted_everywhere("llama"), random_batch(n_tasks=2)
    expected = meta_gradient(all_layers_every_time(adapted_everywhere("llama")), batch, MAML(RULE))
    real = loss_fn.within

    def within(inside: Any, adapter: Any, rows: Any, *, second_order: bool = True) -> Any:
        if second_order:
            raise RowsRearrangedError("a layer gets rows in another order.")
        return real(inside, adapter, rows, second_order=second_order)

    monkeypatch.setattr(loss_fn, "within", within)
    assert_same(meta_gradient(loss_fn, batch, MAML(RULE), tasks_per_forward=plan), expected)
    assert loss_fn.above(tuple(RULE.fast_names(loss_fn.own()))) is None


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
def test_on_a_quantised_base(how: str):
    def made() -> AdapterLoss:
        model = peft_model("head of a decoder", **{how: True})
        randomise(model)
        return AdapterLoss(model)

    _, batch = with_head("head of a decoder")
    algorithm = MAML(HEAD_ALONE)
    assert_same(
        meta_gradient(made(), batch, algorithm), meta_gradient(all_layers_every_time(made()), batch, algorithm), 1e-4
    )


def test_the_memory_of_what_runs_once_is_planned_for():
    loss_fn, batch = adapted_everywhere("llama"), random_batch(n_tasks=4)
    needs = {}
    for name, rule in {"all": replace(RULE, fast=None), "last": RULE}.items():
        plan = MemoryPlan(budget=1e9)
        meta_gradient(loss_fn, batch, MAML(rule), tasks_per_forward=plan)
        (needs[name],) = plan._needs.values()
    assert needs["all"].once == 0
    assert needs["last"].once > 0
    assert needs["last"].graph < 0.6 * needs["all"].graph


def test_nothing_is_asked_of_losses_that_are_no_model():
    def loss(adapter: Any, rows: Any) -> Any:
        return sum((p**2).sum((-2, -1)) for p in adapter.values())

    adapter = {"a": torch.ones(1, 1), "b": torch.ones(1, 1)}
    rule = InnerRule(lr=0.1, steps=1, fast="a")
    batch = random_batch(n_tasks=2)
    fast = adapt(loss, adapter, rule.initial_rates(adapter), batch.support, rule)
    torch.testing.assert_close(fast, {"a": torch.full((2, 1, 1), 0.8), "b": torch.ones(2, 1, 1)})
