from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, random_batch, tiny
from transformers import GenerationConfig

from meta_peft.evaluation.evaluate import Start, curve, joined, tune, tuned_curve
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import SGD, InnerRule
from meta_peft.inner_optimizers.rule import scaled
from meta_peft.types import EpisodeBatch, Rows

STEPS = (0, 1, 3)


@pytest.fixture(scope="module")
def loss_fn() -> AdapterLoss:
    return AdapterLoss(tiny("llama", torch.float32), second_order=False)


@pytest.fixture(scope="module")
def start(loss_fn) -> Start:
    rule = InnerRule(SGD(), lr=0.01, steps=2)
    adapter = {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
    return Start("maml", adapter, rule.initial_rates(adapter), rule)


@pytest.fixture(scope="module")
def batches():
    return [random_batch(n_tasks=3, seed=1), random_batch(n_tasks=2, seed=2)]


def test_curve_is_adaptation_step_by_step(loss_fn, start, batches):
    seen = []
    found = curve(loss_fn, start, batches, STEPS, factor=2.0, progress=seen.append)
    assert found.steps == STEPS
    assert found.loss.shape == found.score.shape == (5, 3)
    assert found.metric == "exact_match"
    assert found.factors == (2.0, 2.0, 2.0)
    assert seen == [3, 2]
    for column, steps in enumerate(STEPS):
        losses = []
        for batch in batches:
            fast = adapt(loss_fn, start.adapter, scaled(start.hyper, 2.0), batch.support, start.rule, steps=steps)
            losses += loss_fn.scores(fast, batch.query).loss_T.tolist()
        np.testing.assert_allclose(found.loss[:, column], losses, rtol=1e-5)
    assert (found.loss[:, 0] != found.loss[:, 2]).all()


def test_steps_come_out_in_order_whatever_order_they_came_in(loss_fn, start, batches):
    forward, backward = (curve(loss_fn, start, batches, steps) for steps in (STEPS, STEPS[::-1]))
    assert backward.steps == STEPS
    np.testing.assert_array_equal(backward.loss, forward.loss)


def test_tune_takes_the_factor_with_the_lowest_loss_for_each_number_of_steps(loss_fn, start, batches):
    # Judged on the rows adapted to: to unrelated random rows, no step is the best step.
    batches = [EpisodeBatch(b.support, b.support, b.tasks) for b in batches]
    factors = (0.1, 1.0, 10.0, 100.0)
    losses = np.stack([curve(loss_fn, start, batches, STEPS, factor=f).loss.mean(0) for f in factors])
    best = tune(loss_fn, start, batches, STEPS, factors)
    assert best == {step: factors[int(losses[:, i].argmin())] for i, step in enumerate(STEPS)}
    assert best[0] == 0.1  # before the first step all are equal: the first
    assert best[3] not in (0.1, 100.0)  # the best is inside the range, so the choice means something


@pytest.mark.parametrize("too_large", [1e20, 1e36])
def test_tune_never_takes_a_factor_that_diverges(loss_fn, start, batches, too_large: float):
    worst = curve(loss_fn, start, batches, [3], factor=too_large).loss
    assert not np.isfinite(worst).all() or worst.mean() > 100
    assert tune(loss_fn, start, batches, [1, 3], [too_large, 1.0]) == {1: 1.0, 3: 1.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_are_no_numbers_count_as_the_worst(loss_fn, start, batches, bad: float):
    """Both in all tasks and in one."""

    class Diverging:
        weights, dense_copies_where_room = loss_fn.weights, loss_fn.dense_copies_where_room

        def __call__(self, fast, rows):
            return loss_fn(fast, rows)

        def scores(self, fast, rows):
            scores = loss_fn.scores(fast, rows)
            if max(p.abs().max() for p in fast.values()) > 2:
                scores.loss_T[:] = bad
            return scores

    assert tune(Diverging(), start, batches, [3], [1e4, 1.0]) == {3: 1.0}


def test_tuned_curve_uses_the_factor_of_each_number_of_steps(loss_fn, start, batches):
    chosen = {3: 1.0, 0: 5.0, 1: 5.0}
    found = tuned_curve(loss_fn, start, batches, chosen)
    assert found.steps == STEPS
    assert found.factors == (5.0, 5.0, 1.0)
    expected = [curve(loss_fn, start, batches, STEPS, factor=f).loss for f in (5.0, 1.0)]
    np.testing.assert_allclose(found.loss[:, :2], expected[0][:, :2], rtol=1e-6)
    np.testing.assert_allclose(found.loss[:, 2], expected[1][:, 2], rtol=1e-6)


def test_curves_of_different_numbers_of_steps_are_joined(loss_fn, start, batches):
    parts = [
        tuned_curve(loss_fn, replace(start, how=how), batches, factors)
        for how, factors in (("one", {0: 1.0, 3: 2.0}), ("other", {1: 5.0}))
    ]
    found = joined(parts)
    assert found.steps == STEPS
    assert found.factors == (1.0, 5.0, 2.0)
    assert found.how == ("one", "other", "one")
    np.testing.assert_array_equal(
        found.loss, np.stack([parts[0].loss[:, 0], parts[1].loss[:, 0], parts[0].loss[:, 1]], 1)
    )
    np.testing.assert_array_equal(found.score[:, 1], parts[1].score[:, 0])
    np.testing.assert_array_equal(found.calibration[1:], [parts[1].calibration[0], parts[0].calibration[1]])


def test_exact_match_is_that_of_greedy_generation(loss_fn, start):
    """Rows labelled with what `generate` writes, then the same with one token changed: the first, and the last."""
    model = loss_fn.model.eval()
    prompts = torch.randint(3, VOCAB, (4, 4), generator=torch.Generator().manual_seed(0))
    greedy = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2)

    def write(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[:, 4:]

    written = write(prompts)
    answers = written.clone()
    answers[1, 0] = (answers[1, 0] + 1) % VOCAB
    answers[2, 2] = (answers[2, 2] + 1) % VOCAB
    ids = torch.cat([prompts, answers], 1)
    labels = torch.cat([torch.full_like(prompts, -100), answers], 1)
    rows = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, 2)
    expected = (written == answers).all(1).float().view(2, 2).mean(1)
    assert expected.tolist() == [0.5, 0.5]
    assert loss_fn.scores(start.adapter, rows).exact_match_T.tolist() == expected.tolist()
    one_each = Rows(rows.inputs, labels, 4)
    assert loss_fn.scores(start.adapter, one_each).exact_match_T.tolist() == [1, 0, 0, 1]
