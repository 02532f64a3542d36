"""How many tasks and graphs are held at once: within the budget, without a difference in the result."""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import psutil
import pytest
import torch
from counted import Alive
from tiny_models import assert_equal, random_batch, random_rows, tiny_base, with_lora
from torch import Tensor
from toys import network, network_rows

from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.outer_loop import memory_plan
from meta_peft.outer_loop.memory_plan import MARGIN, SHARE, MemoryPlan
from meta_peft.outer_loop.outer_loop import in_chunks, meta_gradient
from meta_peft.outer_loop.schedule import AnyAlgorithm
from meta_peft.types import EpisodeBatch, Meta, MetaGradient, Params, Rows

TASKS, STEPS = 6, 4
AUTO = MAML(InnerRule(SGD(), lr=0.02, steps=STEPS))
OTHERS: list[AnyAlgorithm] = [
    MAML(AUTO.inner, first_order=True),
    MAML(AUTO.inner, memory="replay"),
    MAML(AUTO.inner, memory="unrolled"),
    MAML(AUTO.inner, memory=2),
    MAML(AUTO.inner, memory="finite_differences"),
    ImplicitMAML(InnerRule(lr=0.02, steps=2, proximal=5.0)),
    Reptile(AUTO.inner),
    MultiTask(AUTO.inner),
]


@cache
def loss_fn() -> AdapterLoss:
    return AdapterLoss(with_lora(tiny_base("llama", width=8), target_modules=["q_proj", "o_proj", "down_proj"]))


@cache
def batch() -> EpisodeBatch:
    return random_batch(n_tasks=TASKS, support=2, query=1)


def meta() -> Meta:
    adapter = {n: p.detach() for n, p in loss_fn().weights.parameters().items()}
    return Meta(adapter, AUTO.inner.initial_rates(adapter))


def settled(plan: MemoryPlan, algorithm: AnyAlgorithm = AUTO) -> tuple[AnyAlgorithm, int]:
    return plan.settle(algorithm, loss_fn(), meta(), batch())


@cache
def need() -> tuple[int, int, int]:
    """Bytes of one task: a graph, the query's, and copies."""
    plan = MemoryPlan(budget=1.0)
    settled(plan)
    (found,) = plan._needs.values()
    return found.graph, found.query_graph, found.copies


def budget_for(tasks: int, graphs: int) -> float:
    """Just enough for so many tasks with so many graphs each."""
    graph, query_graph, copies = need()
    return MARGIN * tasks * (graphs * graph + query_graph + copies) + 1


def all_of(gradient: MetaGradient) -> Params:
    return {**gradient.grads.adapter, **gradient.grads.hyper, **gradient.metrics}


@cache
def expected(algorithm: AnyAlgorithm = AUTO) -> Params:
    return all_of(meta_gradient(loss_fn(), batch(), algorithm))


# ---- what is chosen


def test_with_room_for_everything_all_is_kept():
    assert settled(MemoryPlan(budget=budget_for(TASKS, STEPS))) == (replace(AUTO, memory=STEPS), TASKS)


def test_graphs_are_given_up_before_tasks():
    """As long as more tasks at once make products more efficient, which the tokens of these tasks all do."""
    for graphs in range(STEPS):
        room = budget_for(TASKS, max(graphs, 1))
        assert settled(MemoryPlan(budget=room)) == (replace(AUTO, memory=max(graphs, 1)), TASKS)
    assert settled(MemoryPlan(budget=budget_for(3, 1))) == (replace(AUTO, memory=1), 3)
    assert settled(MemoryPlan(budget=budget_for(1, 1))) == (replace(AUTO, memory=1), 1)


def test_on_a_cpu_there_are_no_more_tokens_at_once_than_are_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(memory_plan.EFFICIENT_TOKENS, "cpu", 2 * 12)  # those of two tasks
    assert settled(MemoryPlan(budget=budget_for(TASKS, STEPS))) == (replace(AUTO, memory=STEPS), 2)
    assert settled(MemoryPlan(budget=budget_for(2, STEPS))) == (replace(AUTO, memory=STEPS), 2)
    assert settled(MemoryPlan(budget=budget_for(2, 2))) == (replace(AUTO, memory=2), 2)


def test_with_no_room_at_all_it_is_one_task_and_no_graph():
    assert settled(MemoryPlan(budget=1.0)) == (replace(AUTO, memory=0), 1)


def test_a_larger_budget_never_chooses_less():
    budgets = [budget_for(1, 1) * 1.1**i for i in range(40)]
    chosen = [settled(MemoryPlan(budget=budget)) for budget in budgets]
    held = [(size, algorithm.memory) for algorithm, size in chosen]
    assert held == sorted(held)
    assert held[0] == (1, 1)
    assert held[-1] == (TASKS, STEPS)
    assert {size for size, _ in held} == {1, 2, 3, 6}  # parts of about one size: 4 and 5 would leave 2 and 1
    assert {graphs for _, graphs in held} == {1, 2, 3, 4}


def test_what_is_chosen_fits():
    """By the plan's own count, and by what autograd has saved at once while the gradient is computed."""
    for budget in (budget_for(1, 1) * 1.7**i for i in range(7)):
        plan = MemoryPlan(budget=budget)
        algorithm, size = settled(plan)
        assert budget_for(size, algorithm.memory) <= budget + 2
        with Alive() as alive:
            meta_gradient(loss_fn(), batch(), AUTO, tasks_per_forward=plan)
        assert alive.most <= budget, (size, algorithm.memory)


def test_a_fixed_number_of_tasks_leaves_the_graphs_to_choose():
    for tasks, graphs in ((TASKS, 1), (TASKS, 3), (4, 2), (1, 4)):
        plan = MemoryPlan(tasks, budget_for(tasks, graphs))
        assert settled(plan) == (replace(AUTO, memory=graphs), tasks)
    assert settled(MemoryPlan(TASKS, budget=budget_for(2, STEPS)))[0].memory == 0  # two tasks alone could have more
    assert settled(MemoryPlan(99, budget=budget_for(TASKS, STEPS))) == (replace(AUTO, memory=STEPS), TASKS)


@pytest.mark.parametrize("algorithm", OTHERS, ids=lambda a: f"{type(a).__name__} {getattr(a, 'memory', '')}")
def test_what_is_decided_stays_and_has_as_many_tasks_as_fit(algorithm: AnyAlgorithm):
    assert settled(MemoryPlan(budget=1.0), algorithm) == (algorithm, 1)
    assert settled(MemoryPlan(budget=1e12), algorithm) == (algorithm, TASKS)
    assert settled(MemoryPlan(4, budget=1.0), algorithm) == (algorithm, 4)
    sizes = [settled(MemoryPlan(budget=budget_for(1, 1) * 1.3**i), algorithm)[1] for i in range(12)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


def test_graphs_of_truncated_steps_alone_are_counted():
    truncated = replace(AUTO, second_order_steps=2)
    assert settled(MemoryPlan(budget=budget_for(TASKS, 2)), truncated) == (replace(truncated, memory=2), TASKS)
    assert settled(MemoryPlan(budget=1e12), truncated) == (replace(truncated, memory=2), TASKS)


def test_nothing_is_planned_without_a_bound():
    plan = MemoryPlan(budget=math.inf)
    assert settled(plan) == (AUTO, TASKS)
    assert settled(MemoryPlan(2, budget=math.inf)) == (AUTO, 2)
    assert plan._needs == {}


def test_by_default_it_is_a_share_of_what_there_is():
    plan = MemoryPlan()
    assert plan.budget is None
    assert settled(plan) == (replace(AUTO, memory=STEPS), TASKS)
    assert 0 < plan.budget <= SHARE["cpu"] * psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "tasks_per_forward must be 1 or more, or None to find it; got 0"),
        ((None, 0.0), "A memory budget must be positive, got 0.0"),
        ((None, -1.0), "A memory budget must be positive, got -1.0"),
        ((None, math.nan), "A memory budget must be positive, got nan"),
    ],
)
def test_impossible_plans(arguments: tuple, message: str):
    with pytest.raises(MetaPeftError, match=message):
        MemoryPlan(*arguments)


# ---- what is measured


def test_the_graph_of_a_step_grows_in_proportion_to_its_tokens():
    """By about the same number of bytes for each two rows more; the numbers of labelled positions differ a little."""
    sizes = []
    for rows in (2, 4, 6, 8):
        of_rows = EpisodeBatch(random_rows(2, rows), random_rows(2, 1, seed=1), ["a", "b"])
        plan = MemoryPlan(budget=1.0)
        plan.settle(AUTO, loss_fn(), meta(), of_rows)
        (found,) = plan._needs.values()
        assert found.tokens == rows * 6
        sizes.append(found.graph)
    grown = [b - a for a, b in pairwise(sizes)]
    assert grown[0] > 0
    assert max(grown) - min(grown) < 0.1 * grown[0]
    assert sizes[0] < 1.3 * grown[0]  # hardly anything is there for no token at all


def test_the_graph_of_a_step_is_what_a_step_keeps():
    with Alive() as alive:
        meta_gradient(loss_fn(), batch().part(0, 1), replace(AUTO, memory="replay"))
    assert alive.most == pytest.approx(need()[0], rel=0.1)


class Counted:
    """A loss, and the sizes of the stacks that it was computed on."""

    def __init__(self) -> None:
        self.stacks: list[int] = []

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        self.stacks.append(rows.n_tasks)
        return loss_fn()(adapter, rows)


def test_it_measures_once_for_each_kind_and_again_for_larger_rows():
    plan, counted = MemoryPlan(budget=1e9), Counted()

    def measured(algorithm: AnyAlgorithm, support: int = 2, query: int = 1) -> int:
        before = len(counted.stacks)
        plan.settle(algorithm, counted, meta(), random_batch(n_tasks=2, support=support, query=query))
        assert set(counted.stacks[before:]) <= {1}
        return len(counted.stacks) - before

    assert measured(AUTO) == 2
    assert measured(AUTO) == 0
    assert measured(AUTO, support=1) == 0
    assert measured(replace(AUTO, memory="replay")) == 0
    assert measured(AUTO, support=3) == 2
    assert measured(AUTO, query=4) == 2
    assert measured(AUTO, support=3, query=2) == 2  # larger support rows than at the last time
    assert measured(MultiTask(AUTO.inner)) == 1
    assert measured(MAML(replace(AUTO.inner, fast="lora_B"))) == 2


def test_what_was_measured_is_freed():
    def bytes_there() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        there = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in there.values())

    settled(MemoryPlan(budget=1.0))
    before = bytes_there()
    settled(MemoryPlan(budget=1.0))
    assert bytes_there() == before


def test_optimizer_states_and_copies_of_fast_weights_count():
    def copies(rule: InnerRule) -> int:
        plan = MemoryPlan(budget=1.0)
        settled(plan, MAML(rule))
        (found,) = plan._needs.values()
        return found.copies

    sgd, momentum, adam = (copies(InnerRule(optimizer)) for optimizer in (SGD(), SGD(0.9), Adam()))
    weights = sum(p.nbytes for p in meta().adapter.values())
    assert (momentum - sgd, adam - momentum) == (2 * weights, 2 * weights)
    assert copies(InnerRule(SGD(), fast="lora_B")) < sgd


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture):
    plan = MemoryPlan(budget=budget_for(3, 1))  # which another plan may have to measure first
    caplog.set_level(logging.INFO, "meta_peft")
    for _ in range(3):
        settled(plan)
    assert len(caplog.messages) == 1
    assert "3 tasks go through the model at once, the graphs of the last 1 inner steps are kept" in caplog.messages[0]
    settled(plan, MultiTask(AUTO.inner))
    assert len(caplog.messages) == 2
    assert "graphs of" not in caplog.messages[1]
    for algorithm in (AUTO, MultiTask(AUTO.inner)):  # as where steps of one kind and the other take turns
        settled(plan, algorithm)
    assert len(caplog.messages) == 2


# ---- results


def test_the_same_bits_whatever_is_kept():
    """With as many tasks in each forward."""
    for graphs in range(1, STEPS + 1):
        plan = MemoryPlan(3, budget=budget_for(3, graphs))
        assert settled(plan)[0].memory == graphs
        found = all_of(meta_gradient(loss_fn(), batch(), AUTO, tasks_per_forward=plan))
        whole = all_of(meta_gradient(loss_fn(), batch(), AUTO, tasks_per_forward=3))
        assert all(torch.equal(p, whole[n]) for n, p in found.items())


@pytest.mark.parametrize("algorithm", [AUTO, OTHERS[0], *OTHERS[5:]], ids=lambda a: type(a).__name__)
def test_the_same_result_whatever_the_budget(algorithm: AnyAlgorithm):
    for budget in (1.0, budget_for(2, 1), 1e12):
        found = all_of(meta_gradient(loss_fn(), batch(), algorithm, tasks_per_forward=MemoryPlan(budget=budget)))
        assert_equal(found, expected(algorithm), 1e-12)


# ---- where memory runs out after all


class Small:
    """A device on which more than so many tasks at once do not fit: the loss says so as torch does."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError):
        self.most, self.error, self.stacks = most, error, []

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        self.stacks.append(rows.n_tasks)
        if rows.n_tasks > self.most:
            raise self.error(f"can't allocate memory: {rows.n_tasks} tasks")
        return network(adapter, rows)

    def attempts(self) -> list[int]:
        """The stack sizes, each once as long as it does not change."""
        return [n for i, n in enumerate(self.stacks) if i == 0 or n != self.stacks[i - 1]]


@pytest.fixture
def toy() -> tuple[Meta, EpisodeBatch]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (3, 2)}
    adapter = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    rows = network_rows(1, 11), network_rows(2, 11)
    return Meta(adapter, AUTO.inner.initial_rates(adapter)), EpisodeBatch(*rows, list("abcdefghijk"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_half_as_many_tasks_are_tried_and_remembered(toy, error: type[Exception], caplog: pytest.LogCaptureFixture):
    """11, 5, then 2 at once; no task is left out, and the next batch starts with 2."""
    meta, batch = toy
    device, plan = Small(3, error), MemoryPlan(budget=math.inf)
    found = in_chunks(AUTO, device, meta, batch, plan)
    assert device.attempts() == [11, 5, 2, 1]  # of 11 tasks, one is left for the end
    whole = AUTO(network, meta, batch)
    assert_equal(all_of(found), all_of(whole), 1e-12)
    assert found.n_tasks == 11
    assert [m for m in caplog.messages if "Memory ran out" in m] == [
        "Memory ran out with 11 tasks at once; going on with 5.",
        "Memory ran out with 5 tasks at once; going on with 2.",
    ]
    device.stacks.clear()
    assert_equal(all_of(in_chunks(AUTO, device, meta, batch, plan)), all_of(whole), 1e-12)
    assert device.attempts() == [2, 1]


def test_it_may_run_out_in_the_middle_of_a_batch(toy):
    """The parts that were done stay done."""
    meta, batch = toy
    device = Small(4)
    plan, calls = MemoryPlan(4, budget=math.inf), 0

    def less_later(adapter: Params, rows: Rows) -> Tensor:
        nonlocal calls
        calls += 1
        device.most = 4 if calls <= 6 else 1
        return device(adapter, rows)

    found = in_chunks(AUTO, less_later, meta, batch, plan)
    assert device.attempts() == [4, 2, 1]
    assert_equal(all_of(found), all_of(AUTO(network, meta, batch)), 1e-12)


def test_a_planned_split_is_halved_with_its_budget(toy):
    """Otherwise twice the graphs would be kept of half the tasks, which takes the same memory again."""
    plan = MemoryPlan(budget=budget_for(TASKS, 2))
    assert settled(plan) == (replace(AUTO, memory=2), TASKS)
    assert plan.shrink(TASKS)
    assert settled(plan) == (replace(AUTO, memory=2), TASKS // 2)


@cache
def most(memory: str, tasks: int) -> int:
    with Alive() as alive:
        meta_gradient(loss_fn(), batch(), replace(AUTO, memory=memory), tasks_per_forward=tasks)
    return alive.most


@pytest.mark.parametrize(
    "plan", [lambda: None, lambda: MemoryPlan(budget=1e12)], ids=["nothing planned", "a wrong budget"]
)
def test_on_a_device_of_any_size_the_result_is_the_same(plan):
    """From one that holds everything to one that holds a single task without graphs. What a failed attempt has saved is
    freed before the next one, or that one would fail too."""
    unrolled, replayed = (most(memory, 1) for memory in ("unrolled", "replay"))
    for limit in (most("unrolled", 6), most("unrolled", 3), unrolled, unrolled - 1, replayed):
        with Alive(limit) as alive:
            found = meta_gradient(loss_fn(), batch(), AUTO, tasks_per_forward=plan())
        assert alive.now == 0
        assert_equal(all_of(found), expected(), 1e-12)


def test_where_a_single_task_does_not_fit_the_error_says_what_to_do():
    for plan in (None, MemoryPlan(budget=1e12), MemoryPlan(2, budget=1e12)):
        with Alive(most("replay", 1) / 2), pytest.raises(MetaPeftError) as error:
            meta_gradient(loss_fn(), batch(), AUTO, tasks_per_forward=plan)
        assert "Memory ran out with a single task. Shorten rows (max_length), take fewer of them" in str(error.value)
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_graphs_that_were_asked_for_are_kept_and_the_error_names_them():
    with Alive(most("unrolled", 1) / 2), pytest.raises(MetaPeftError) as error:
        meta_gradient(loss_fn(), batch(), replace(AUTO, memory="unrolled"))
    assert "Keep no graphs (memory='replay'), shorten rows" in str(error.value)


@pytest.mark.parametrize("algorithm", OTHERS[5:], ids=lambda a: type(a).__name__)
def test_other_algorithms_are_halved_too(algorithm: AnyAlgorithm):
    calls: list[int] = []

    def small(adapter: Params, rows: Rows) -> Tensor:
        calls.append(rows.n_tasks)
        if rows.n_tasks > 2:
            raise torch.OutOfMemoryError("too many")
        return loss_fn()(adapter, rows)

    found = in_chunks(algorithm, small, meta(), batch(), MemoryPlan(budget=math.inf))
    assert [n for i, n in enumerate(calls) if i == 0 or n != calls[i - 1]] == [6, 3, 1]
    assert_equal(all_of(found), expected(algorithm), 1e-12)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("no"), KeyboardInterrupt()])
def test_other_errors_come_through_at_once(toy, error: BaseException):
    meta, batch = toy
    calls = 0

    def broken(adapter: Params, rows: Rows) -> Tensor:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)) as caught:
        in_chunks(AUTO, broken, meta, batch, MemoryPlan(budget=math.inf))
    assert caught.value is error
    assert calls == 1


def test_a_real_allocation_that_fails_is_recovered_from(toy):
    """128 TB, which no machine has: torch's own error, from its own allocator."""
    meta, batch = toy

    def large(adapter: Params, rows: Rows) -> Tensor:
        if rows.n_tasks > 3:
            torch.empty(2**47, dtype=torch.uint8)
        return network(adapter, rows)

    found = in_chunks(AUTO, large, meta, batch, MemoryPlan(budget=math.inf))
    assert_equal(all_of(found), all_of(AUTO(network, meta, batch)), 1e-12)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_what_the_budget_leaves_over_holds_dequantised_copies_with_the_same_result(model_of, name: str):
    loss_fn, batch = AdapterLoss(model_of(name)), random_batch()
    algorithm = MAML(InnerRule(lr=0.05, steps=2))
    plain = meta_gradient(loss_fn, batch, algorithm)
    plan = MemoryPlan(budget=1e12)
    copied = meta_gradient(loss_fn, batch, algorithm, tasks_per_forward=plan)
    assert plan.spare > 0
    assert all(torch.equal(copied.grads.adapter[n], plain.grads.adapter[n]) for n in plain.grads.adapter)
