"""What a baseline was before its training ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from surface import config, letter_tasks, peft_model, tiny_tokenizer
from transformers import TrainerCallback

from meta_peft import MetaTrainer, TaskSet
from meta_peft.comparison.early_stops import PARTS, stops_of, train_with_stops
from meta_peft.evaluation.evaluate import Start


def trainer_of(folder: Path, callbacks: list[TrainerCallback] | None = None, **options) -> MetaTrainer:
    args = config(folder, learning_rate=0.01, inner_lr_learning_rate=0.1, **options)
    tasks = TaskSet.of(letter_tasks("abcdefgh"))
    return MetaTrainer(peft_model(), args, tasks, processing_class=tiny_tokenizer(), callbacks=callbacks)


def assert_same(start: Start, other: Start) -> None:
    for mine, its in ((start.adapter, other.adapter), (start.hyper, other.hyper)):
        assert mine.keys() == its.keys()
        assert all(torch.equal(value, its[name]) for name, value in mine.items())
    assert start.rule == other.rule


@pytest.mark.parametrize("algorithm", ["fomaml", "multitask"])
def test_it_is_what_a_run_holds_after_these_outer_steps(tmp_path: Path, algorithm: str):
    held = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held[state.global_step] = watched.start("watched")

    watched = trainer_of(tmp_path / "a", [Look()], algorithm=algorithm, max_steps=8)
    watched.train()
    starts = train_with_stops(trainer_of(tmp_path / "b", algorithm=algorithm, max_steps=8), "kept")
    parts = [("kept", "", 1.0), *(("kept", how, part) for how, part in PARTS.items())]
    assert [(start.name, start.how, start.part) for start in starts] == parts
    for start, step in zip(starts, (8, 2, 4), strict=True):
        assert_same(start, held[step])
    moved = {name for name, value in starts[1].adapter.items() if not torch.equal(value, starts[2].adapter[name])}
    assert moved, "it goes on learning between the two"


@pytest.mark.parametrize(("last", "parts"), [(1, []), (2, ["half of its training"])])
def test_a_part_that_is_no_outer_step(tmp_path: Path, last: int, parts: list[str]):
    starts = train_with_stops(trainer_of(tmp_path, algorithm="multitask", max_steps=last), "short")
    assert [start.how for start in starts] == ["", *parts]


def test_parts_are_counted_from_the_end_of_a_warm_up(tmp_path: Path):
    quarter, half = PARTS
    options = {"max_steps": 10, "multitask_warmup_steps": 2}
    found = {name: stops_of(config(tmp_path, algorithm=name, **options)) for name in ("fomaml", "multitask")}
    assert found == {"fomaml": {4: quarter, 6: half}, "multitask": {2: quarter, 5: half}}


def test_a_trainer_takes_back_what_it_was(tmp_path: Path):
    trainer = trainer_of(tmp_path, algorithm="fomaml", max_steps=4)
    _, quarter, _ = train_with_stops(trainer, "kept")
    trainer.take(quarter)
    assert_same(trainer.start(), quarter)
