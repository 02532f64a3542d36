from __future__ import annotations

from dataclasses import replace

import pytest

from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile
from meta_peft.inner_optimizers import InnerRule
from meta_peft.outer_loop.schedule import Schedule

RULE = InnerRule(lr=0.3, steps=2)
MINE = MAML(RULE, second_order_steps=1, memory="replay")


def test_without_anything_to_change_the_algorithm_stays():
    for algorithm in (MINE, MAML(RULE, multi_step=0.25), Reptile(RULE), MultiTask(RULE)):
        assert [Schedule(algorithm).at(step) for step in (0, 1, 100)] == [algorithm] * 3


@pytest.mark.parametrize("algorithm", [MINE, ImplicitMAML(replace(RULE, proximal=1.0)), Reptile(RULE)])
def test_multitask_training_comes_first_with_the_rule_of_what_follows(algorithm):
    schedule = Schedule(algorithm, multitask_until=3)
    assert [schedule.at(step) for step in range(5)] == [MultiTask(algorithm.inner)] * 3 + [algorithm] * 2


def test_inner_gradients_are_constants_until_then():
    """Derivative-order annealing."""
    schedule = Schedule(MINE, first_order_until=2)
    assert [schedule.at(step) for step in range(4)] == [replace(MINE, first_order=True)] * 2 + [MINE] * 2
    assert not schedule.at(0).second_order
    assert schedule.at(2).second_order


def test_first_order_stays_first_order():
    first_order = MAML(RULE, first_order=True)
    assert Schedule(first_order, first_order_until=2).at(5) == first_order


def test_earlier_query_losses_count_less_and_less():
    """Multi-step loss: from all inner steps alike to the last one alone."""
    schedule = Schedule(MINE, multi_step_until=4)
    assert [schedule.at(step).multi_step for step in range(7)] == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert schedule.at(4) == MINE
    assert replace(schedule.at(1), multi_step=0.0) == MINE


def test_all_of_it_together_counts_outer_steps_from_the_first():
    schedule = Schedule(MINE, multitask_until=1, multi_step_until=4, first_order_until=2)
    assert schedule.at(0) == MultiTask(RULE)
    found = [(schedule.at(step).multi_step, schedule.at(step).first_order) for step in range(1, 5)]
    assert found == [(0.75, True), (0.5, False), (0.25, False), (0, False)]


@pytest.mark.parametrize("algorithm", [ImplicitMAML(replace(RULE, proximal=1.0)), Reptile(RULE), MultiTask(RULE)])
def test_what_is_of_maml_alone_leaves_other_algorithms_as_they_are(algorithm):
    schedule = Schedule(algorithm, multi_step_until=4, first_order_until=2)
    assert [schedule.at(step) for step in (0, 1, 5)] == [algorithm] * 3
