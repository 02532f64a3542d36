"""Where the start of a head is learned, and where it stays at zero since class numbers mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heads import CASES, model_of
from surface import config, tiny_folder
from tiny_models import tiny_base, with_lora

from meta_peft import MetaPeftError, MetaTrainer, ModelArguments
from meta_peft.base.new_adapter import new_model
from meta_peft.base.tokenizers import tokenizer_for
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.lora.fast_weights import is_lora
from meta_peft.lora.whole_head import last_layer
from meta_peft.types import Rows

PERMUTED = {"ways": 3, "label_words": "permuted", "shots": 2, "query_size": 2}
RULE = {"inner_optimizer": "sgd", "inner_lr": 0.1, "inner_steps": 2, "fast_weights": "score"}
TASKS = {name: [{"text": f"{c}{n}{c}", "label": c} for c in name for n in range(6)] for name in ("abc", "def", "ghi")}


def trainer(folder: Path, objective: str = "sequence_classification", **options: Any) -> MetaTrainer:
    how: dict[str, Any] = {"objective": objective, "lora_target_modules": ["q_proj", "v_proj"]}
    how |= {"num_labels": 3} if objective != "causal_lm" else {}
    model_args = ModelArguments(str(tiny_folder()), **how)
    args = config(folder / "out", **{**PERMUTED, **RULE, "learning_rate": 0.01, "max_steps": 3, **options})
    return MetaTrainer(new_model(model_args, 0), args, TASKS, processing_class=tokenizer_for(model_args))


def head_of(run: MetaTrainer) -> torch.Tensor:
    return next(p for name, p in run.loss_fn.weights.parameters().items() if not is_lora(name))


@pytest.mark.parametrize("case", CASES)
def test_the_last_layer_is_the_one_that_knows_classes(case: str):
    head = CASES[case].head
    last = head[-1].rpartition(".")[0]
    assert last_layer(model_of(case)) == {f"base_model.model.{n}" for n in head if n.rpartition(".")[0] == last}


def test_a_language_model_has_none():
    assert last_layer(with_lora(tiny_base())) == frozenset()


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({}, True),
        ({"algorithm": "fomaml"}, True),
        ({"algorithm": "reptile", "fast_weights": None}, True),
        ({"fast_weights": None}, True),
        ({"learn_head": True}, False),
        ({"label_words": "given"}, False),
        ({"label_words": "given", "learn_head": False}, True),
        ({"fast_weights": "lora"}, False),
        ({"algorithm": "multitask"}, False),
        ({"multitask_warmup_steps": 2}, False),
    ],
    ids=str,
)
def test_the_start_stays_at_zero_where_class_numbers_mean_nothing(tmp_path: Path, options: Any, stays: bool):
    run = trainer(tmp_path, **options)
    before = {n: p.detach().clone() for n, p in run.loss_fn.weights.parameters().items()}
    run.train()
    moved = {n for n, p in run.loss_fn.weights.parameters().items() if (p != before[n]).any()}
    assert any(is_lora(name) for name in moved)
    assert bool(head_of(run).any()) == (not stays)


def test_from_zero_every_numbering_of_the_classes_is_alike(tmp_path: Path):
    """The losses after adaptation of one episode, classes numbered in another way; a learned start prefers one way."""
    for learn_head in (None, True):
        run = trainer(tmp_path, learn_head=learn_head, max_steps=5)
        run.train()
        batch = run.data_collator([run.train_dataset[0]])
        losses = []
        for order in (torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])):
            support, query = (Rows(rows.inputs, order[rows.labels_BL], 1) for rows in (batch.support, batch.query))
            start = run.start()
            fast = adapt(run.loss_fn, start.adapter, start.hyper, support, start.rule)
            losses.append(float(run.loss_fn(fast, query)))
        assert (abs(losses[0] - losses[1]) < 1e-5) == (learn_head is None), losses


def test_weight_decay_and_clipping_leave_it_alone(tmp_path: Path):
    run = trainer(tmp_path, label_words="given", learn_head=False, weight_decay=0.5)
    head_of(run).data.fill_(0.3)
    run.train()
    assert torch.equal(head_of(run), torch.full_like(head_of(run), 0.3))


@pytest.mark.parametrize("options", [{"algorithm": "multitask"}, {"multitask_warmup_steps": 2}])
def test_refused_where_it_would_never_move(tmp_path: Path, options: Any):
    with pytest.raises(MetaPeftError, match="learn_head=False is for algorithms that adapt the head"):
        config(tmp_path / "out", **{**PERMUTED, **RULE, "learn_head": False, **options})


def test_refused_where_the_head_does_not_adapt(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="learn_head=False needs a head that adapts, and fast_weights='lora'"):
        trainer(tmp_path, fast_weights="lora", learn_head=False)


def test_refused_without_a_head(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="learn_head=False needs a classification head"):
        trainer(tmp_path, "causal_lm", fast_weights=None, learn_head=False)
