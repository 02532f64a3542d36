"""Steps that change nothing because a number is not finite, and what is said about them."""

from __future__ import annotations

import logging
from pathlib import Path

import kinds
import pytest
import torch
from surface import bits, letter_tasks, trainer

from meta_peft import MetaPeftError
from meta_peft.training.trainer import MetaTrainer
from meta_peft.types import Params, Rows

OPTIONS = {"max_steps": 6, "tasks_per_step": 2, "inner_steps": 2, "save_strategy": "steps", "save_steps": 1}


def spoil(run: MetaTrainer, when, how) -> None:
    """`how` changes the losses of every call for which `when(rows, call)` holds."""
    original, calls = run.loss_fn._measured, []

    def measured(measure, adapter: Params, rows: Rows):
        calls.append(rows)
        found = original(measure, adapter, rows)
        return [how(loss) for loss in found] if when(rows, len(calls)) else found

    run.loss_fn._measured = measured


def learned(run: MetaTrainer) -> dict[str, torch.Tensor]:
    return {**run.loss_fn.weights.parameters(), "log_rates": run.rates.log_rates}


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Spoil what is computed until the third outer step's end: with one task that has a bad row, this step is left out."""
    plain = trainer(tmp_path / "plain", **{**OPTIONS, "max_steps": 2})
    plain.train()
    run = trainer(tmp_path / "run", **{**OPTIONS, "max_steps": 3})
    spoil(run, lambda rows, call: run.state.global_step == 2, lambda loss: loss * float("nan"))
    with caplog.at_level(logging.WARNING, logger="meta_peft"):
        run.train()
    assert bits(learned(run)) == bits(learned(plain))
    said = [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]
    assert len(said) == 1
    assert "Outer step 3 changes nothing, its gradient is not finite: task 'say " in said[0]
    assert "its loss at inner step 1 (nan)" in said[0]


def test_a_gradient_that_is_not_finite_is_named_with_its_matrices(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    run = trainer(tmp_path, algorithm="fomaml", query_size=3, **{**OPTIONS, "max_steps": 1})
    spoil(run, lambda rows, call: len(rows.labels_BL) == 3 * rows.n_tasks, Spoiled.apply)
    with caplog.at_level(logging.WARNING, logger="meta_peft"):
        run.train()
    assert "its gradient at the query rows in" in caplog.text
    assert "lora_B" in caplog.text


def test_looking_for_the_task_may_fail_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The other processes would wait for the words of one that ran out of memory on the way to them."""

    def broken(*args):
        raise MemoryError("looking closer")

    monkeypatch.setattr("meta_peft.outer_loop.outer_step.what_is_not_finite", broken)
    run = trainer(tmp_path, **{**OPTIONS, "max_steps": 1})
    spoil(run, lambda rows, call: True, lambda loss: loss * float("nan"))
    with caplog.at_level(logging.WARNING, logger="meta_peft"):
        run.train()
    assert "Outer step 1 changes nothing, its gradient is not finite: perhaps task 'say " in caplog.text
    assert "which could not be looked at by itself (MemoryError('looking closer'))" in caplog.text


def test_too_many_in_a_row_stop_training_with_the_state_saved(tmp_path: Path):
    run = trainer(tmp_path, max_skipped_updates=2, **OPTIONS)
    spoil(run, lambda rows, call: run.state.global_step >= 1, lambda loss: loss + float("inf"))
    with pytest.raises(MetaPeftError, match=r"2 outer steps in a row were not finite .* in checkpoint-3 of"):
        run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    good = trainer(tmp_path, max_skipped_updates=2, **OPTIONS)
    good.train(resume_from_checkpoint=True)
    assert good.state.global_step == 6


def test_one_in_between_does_not_count_as_in_a_row(tmp_path: Path):
    run = trainer(tmp_path, max_skipped_updates=2, **OPTIONS)
    spoil(run, lambda rows, call: run.state.global_step % 2 == 0, lambda loss: loss * float("nan"))
    run.train()
    assert run.state.global_step == 6


def test_an_inner_loop_that_goes_uphill_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("meta_peft.outer_loop.health.UPHILL", (1.05, 0.0))  # a loss of random weights cannot double
    options = {**OPTIONS, "inner_optimizer": "sgd", "inner_lr": 300.0, "learn_inner_lr": False, "learning_rate": 0.0}
    run = trainer(tmp_path, tasks=letter_tasks("abc"), **{**options, "max_steps": 4})
    with caplog.at_level(logging.WARNING, logger="meta_peft"):
        run.train()
    logged = [line["diverged_tasks"] for line in run.state.log_history if "loss" in line]
    assert sum(logged) >= 3
    named = [record.getMessage() for record in caplog.records if "goes uphill" in record.getMessage()]
    for letter in "abc":
        assert sum(f"'say {letter}'" in line for line in named) <= 1
    assert named


def test_tasks_are_not_chosen_by_weights_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The start of a head whose classes change places has a gradient, and no outer step follows it."""
    options = {"ways": 2, "label_words": "permuted", "shots": 1, "query_size": 1, "max_steps": 1}
    options |= {"task_sampling": "by_gradient_similarity", "deterministic_reduction": True}
    run = kinds.trainer(kinds.HEAD, tmp_path, **options)
    sampling, noted = run.train_dataset.sampling, []
    note = sampling.note
    monkeypatch.setattr(sampling, "note", lambda gradient: noted.append(set(gradient.grads.adapter)) or note(gradient))
    run.train()
    assert run.fixed
    assert noted
    assert all(names == set(run.loss_fn.weights.parameters()) - run.fixed for names in noted)
