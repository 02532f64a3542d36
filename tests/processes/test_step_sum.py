from __future__ import annotations

import pytest
import torch

from meta_peft import MetaPeftError
from meta_peft.processes import StepSum
from meta_peft.types import Meta, MetaGradient

ADAPTER = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
RATES = {"log_rates": torch.zeros(1, 2)}


def gradient(value: float, n_tasks: int, rates: bool = True) -> MetaGradient:
    like = lambda params: {n: torch.full_like(p, value) for n, p in params.items()}  # noqa: E731
    return MetaGradient(
        Meta(like(ADAPTER), like(RATES) if rates else {}), n_tasks, {"loss": torch.full((n_tasks,), value)}
    )


def test_the_mean_is_over_tasks():
    step = StepSum(ADAPTER, RATES)
    step.add(gradient(1.0, 3), diverged=1)
    step.add(gradient(5.0, 1), first=3)
    total = step.total()
    assert total.gradient.n_tasks == 4
    assert total.diverged == 1
    assert not total.stop
    assert list(total.gradient.grads.adapter) == ["a", "b"]
    for name, like in (ADAPTER | RATES).items():
        found = {**total.gradient.grads.adapter, **total.gradient.grads.hyper}[name]
        torch.testing.assert_close(found, torch.full_like(like, 2.0))
    assert total.gradient.metrics["loss"].tolist() == [2.0]


def test_a_total_starts_anew():
    step = StepSum(ADAPTER, RATES)
    step.add(gradient(1.0, 1))
    step.total()
    step.add(gradient(3.0, 2))
    assert step.total().gradient.metrics["loss"].tolist() == [3.0]


def test_rates_without_a_gradient_have_none():
    step = StepSum(ADAPTER, RATES)
    step.add(gradient(1.0, 2, rates=False))
    assert step.total().gradient.grads.hyper == {}


def test_in_order_the_order_of_adding_is_not_the_order_of_summing():
    """1 + 1e-8 - 1 is 0 in one order and not in another."""
    values = [1.0, 1e-8, -1.0]
    sums = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        step = StepSum(ADAPTER, RATES, in_order=True)
        for place in order:
            step.add(gradient(values[place], 1), first=place)
        sums.append(float(step.total().gradient.grads.adapter["b"][0]))
    assert sums == [0.0] * 3
    with pytest.raises(MetaPeftError, match="in_order adds up single tasks, got a gradient of 2"):
        StepSum(ADAPTER, RATES, in_order=True).add(gradient(1.0, 2))


def test_a_failure_comes_out_of_the_total_as_it_was():
    step = StepSum(ADAPTER, RATES)
    step.add(gradient(1.0, 1))
    step.fail(ValueError("the first one"))
    step.fail(ValueError("what came of it"))
    with pytest.raises(ValueError, match="the first one"):
        step.total()


@pytest.mark.parametrize("in_order", [False, True])
def test_no_task_at_all(in_order: bool):
    with pytest.raises(MetaPeftError, match="no task in any process"):
        StepSum(ADAPTER, RATES, in_order=in_order).total()


@pytest.mark.parametrize("in_order", [False, True])
def test_a_wish_to_stop_is_passed_on(in_order: bool):
    step = StepSum(ADAPTER, RATES, in_order=in_order)
    step.add(gradient(1.0, 1))
    assert step.total(stop=True).stop


def test_the_most_precise_dtype_holds_all():
    step = StepSum({"a": torch.zeros(2, dtype=torch.float64)}, {"r": torch.zeros(1)})
    step.add(
        MetaGradient(Meta({"a": torch.full((2,), 1 / 3).double()}, {"r": torch.ones(1)}), 1, {"loss": torch.ones(1)})
    )
    grads = step.total().gradient.grads
    assert grads.adapter["a"].dtype == torch.float64


@pytest.mark.parametrize("in_order", [False, True])
def test_what_was_noted_of_a_task_stands_in_its_place(in_order: bool):
    """Whatever the order of adding, and without a change of the mean; also next to a gradient that is not finite."""
    step, plain = (StepSum(ADAPTER, RATES, in_order=in_order, notes=notes) for notes in ((4, 2), (0, 0)))
    for place in (2, 0, 3):
        one = gradient(0.1 * place, 1)
        step.add(one, first=place, noted=torch.tensor([[0.1 + place, 0.3]]))
        plain.add(one, first=place)
    total, without = step.total(), plain.total()
    assert total.notes[:, 0].tolist() == torch.tensor([0.1, 0.0, 2.1, 3.1]).tolist()
    assert total.notes[:, 1].tolist() == torch.tensor([0.3, 0.0, 0.3, 0.3]).tolist()
    assert without.notes.shape == (0, 0)
    for name in ADAPTER:
        assert torch.equal(total.gradient.grads.adapter[name], without.gradient.grads.adapter[name])
    step.add(gradient(float("nan"), 1), first=1, noted=torch.tensor([[float("nan"), 0.5]]))
    step.add(gradient(1.0, 1), first=0, noted=torch.tensor([[7.0, 8.0]]))
    assert step.total().notes[:3].nan_to_num(-1.0).tolist() == [[7.0, 8.0], [-1.0, 0.5], [0.0, 0.0]]


def test_notes_of_several_tasks_at_once():
    step = StepSum(ADAPTER, RATES, notes=(3, 1))
    step.add(gradient(1.0, 2), first=1, noted=torch.tensor([[5.0], [6.0]]))
    step.add(gradient(1.0, 1), first=0, noted=torch.tensor([[4.0]]))
    assert step.total().notes.tolist() == [[4.0], [5.0], [6.0]]
