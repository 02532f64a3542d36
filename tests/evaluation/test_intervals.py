"""Bootstrap intervals: how often they hold the true mean."""

from __future__ import annotations

import numpy as np
import pytest

from meta_peft.evaluation.intervals import interval


def test_interval_is_deterministic_and_holds_the_mean():
    values = np.random.default_rng(0).normal(3, 1, 50)
    low, high = interval(values)
    assert interval(values) == (low, high)
    assert interval(values, seed=1) != (low, high)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.05)
    assert interval(np.full(7, 2.0)) == (2, 2)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    bounds = [interval(rng.exponential(1, 40), seed=i, resamples=400) for i in range(300)]
    covered = np.mean([low < 1 < high for low, high in bounds])
    assert 0.88 < covered < 0.98


def test_one_seed_says_nothing_of_seeds():
    values = np.random.default_rng(0).normal(3, 1, 50)
    assert interval(values[None]) == interval(values)


def test_of_several_seeds_both_are_drawn():
    """Where all tasks agree, what is left is the spread of the seeds, and the other way round."""
    of_seeds, of_tasks = np.array([0.0, 1, 2, 3, 4])[:, None], np.arange(50.0)[None]
    low, high = interval(np.repeat(of_seeds, 50, axis=1))
    assert high - low == pytest.approx(2 * 1.96 * of_seeds.std() / 5**0.5, rel=0.05)
    assert interval(np.repeat(of_tasks, 5, axis=0)) == pytest.approx(interval(of_tasks[0]), rel=0.05)
    assert interval(np.full((3, 4), 2.0)) == pytest.approx((2, 2))


def test_the_interval_over_tasks_and_seeds_is_rather_too_wide_and_that_over_tasks_too_narrow():
    """Means of 20 tasks move by 2 points from seed to seed, as the recorded comparisons do."""
    rng = np.random.default_rng(0)
    held = {"tasks and seeds": [], "tasks": []}
    for i in range(300):
        values = rng.normal(0, 0.03, (1, 20)) + rng.normal(0, 0.02, (5, 1)) + rng.normal(0, 0.08, (5, 20))
        for name, given in (("tasks and seeds", values), ("tasks", values.mean(0))):
            low, high = interval(given, seed=i, resamples=400)
            held[name].append(low < 0 < high)
    assert np.mean(held["tasks"]) < 0.88
    assert 0.92 < np.mean(held["tasks and seeds"]) < 1
