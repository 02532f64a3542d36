from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from surface import (
    EVAL,
    TRAIN,
    base_model,
    bits,
    config,
    letter_rows,
    letter_tasks,
    lora,
    peft_model,
    tiny_folder,
    tiny_tokenizer,
    trainer,
    write_jsonl,
)
from tiny_models import fingerprint
from transformers import TrainerCallback

from meta_peft import (
    EpisodeDataset,
    LearnedRates,
    MetaPeftError,
    MetaTrainer,
    TaskSet,
    assign_gradient,
    load,
    meta_gradient,
)
from meta_peft.adaptation.adapt import adapt
from meta_peft.adapters.card import CardResults
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.cli import main
from meta_peft.evaluation.evaluate import curve
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.survival import checkpoints
from meta_peft.types import EpisodeBatch, Meta

# Adam divides a gradient by its own size, which makes a step of rounding errors where a gradient is almost zero (that of
# LoRA A while B is zero): two ways of computing one gradient are compared by plain gradient descent.
SMOOTH = {"optim": "sgd", "inner_optimizer": "sgd", "inner_lr": 0.1, "max_grad_norm": 0.5, "learning_rate": 0.2}
LEARNS = {"max_steps": 20, "per_device_train_batch_size": 4, "query_size": 4, "inner_steps": 3, "learning_rate": 0.01}


def weights(run: MetaTrainer) -> dict[str, torch.Tensor]:
    """Everything that is learned, copied."""
    learned = {**run.loss_fn.weights.parameters(), "log_rates": run.rates.log_rates}
    return {name: p.detach().clone() for name, p in learned.items()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- learning


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> MetaTrainer:
    """A run that has learned something, for tests that do not train it further."""
    run = trainer(tmp_path_factory.mktemp("learned"), eval_tasks=letter_tasks(EVAL), **LEARNS)
    run.train()
    return run


def test_the_loss_goes_down_and_the_log_says_so(learned: MetaTrainer):
    log = [line for line in learned.state.log_history if "loss" in line]
    assert [line["step"] for line in log] == list(range(1, 21))
    assert all(line["grad_norm"] > 0 and line["learning_rate"] == 0.01 for line in log)
    first, last = (sum(line["loss"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.8 * first
    assert all(0 < line["data_wait_share"] < 1 for line in log)
    assert all(line["tasks_per_second"] > 0 and line["peak_memory_gb"] > 0 for line in log)
    assert all(line["loss_before"] > line["loss"] for line in log[-5:]), "the inner loop helps"


def test_episodes_of_classes(tmp_path: Path):
    """Two ways, two shots of each, words permuted: rows and classes as the options say, in training and evaluation."""
    rows = [{"text": row["input"], "label": row["target"]} for letter in TRAIN for row in letter_rows(letter)]
    held_out = [{"text": row["input"], "label": row["target"]} for letter in EVAL for row in letter_rows(letter)]
    options = {"task_column": ["label"], "ways": 2, "label_words": "permuted", "eval_query_size": 3}
    run = trainer(tmp_path, tasks=rows, eval_tasks=held_out, **options)
    batch = run.data_collator([run.train_dataset[0], run.train_dataset[1]])
    assert (batch.support.labels_BL.shape[0], batch.query.labels_BL.shape[0]) == (2 * 2 * 2, 2 * 2 * 2)
    run.train()
    assert 0 <= run.evaluate()["eval_exact_match"] <= 1
    assert len(run.eval_dataset) == len(EVAL)
    assert len(run.eval_dataset[0].query) == 2 * 3
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| `ways` | 2 |\n| `label_words` | permuted |" in card


RUNS = {
    "maml": {},
    "fomaml": {"algorithm": "fomaml"},
    "reptile": {"algorithm": "reptile"},
    "multitask": {"algorithm": "multitask"},
    "imaml": {"algorithm": "imaml", "proximal": 5.0, "inner_optimizer": "sgd"},
    "truncated": {"inner_steps": 3, "second_order_steps": 1},
    "maml++": {"inner_steps": 2, "inner_lr_per_step": True, "multi_step_until": 2, "first_order_until": 1},
    "anil": {"fast_weights": "lora_B"},
    "meta-sgd": {"inner_lr_per_entry": True, "inner_optimizer": "sgd"},
    "regularised": {"proximal": 1.0, "inner_max_grad_norm": 0.3, "inner_weight_decay": 0.1},
    "replay": {"memory": "replay"},
    "warm-up": {"multitask_warmup_steps": 1},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_algorithm_learns_what_its_own_loop_learns(tmp_path: Path, name: str):
    """MetaTrainer is glue: three steps of it are three AdamW steps on `meta_gradient`, the rates clipped apart."""
    options = {"max_steps": 3, "max_grad_norm": 0.5, "inner_lr_learning_rate": 0.1, **RUNS[name]}
    run = trainer(tmp_path, **options)
    run.train()

    model, args = peft_model(), config(tmp_path, **options)
    loss_fn = AdapterLoss(model, second_order=args.algorithm_object().second_order)
    rates = LearnedRates(args.inner_rule(), dict(loss_fn.weights.parameters()))
    own = list(loss_fn.weights.parameters().values())
    groups = [{"params": own, "lr": 0.02}, {"params": [rates.log_rates], "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)  # as `TrainingArguments` has it
    losses = []
    for step in range(3):
        batch = run.data_collator([run.train_dataset[2 * step], run.train_dataset[2 * step + 1]])
        gradient = meta_gradient(loss_fn, batch, args.schedule().at(step), rates)
        losses.append(float(gradient.metrics["loss"].mean()))
        assign_gradient(gradient, model, rates)
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        if rates.log_rates.grad is not None:
            torch.nn.utils.clip_grad_norm_([rates.log_rates], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(run), {**loss_fn.weights.parameters(), "log_rates": rates.log_rates.data}, 1e-6)
    logged = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert logged == pytest.approx(losses, abs=1e-4)


def test_rates_are_learned_and_saved(tmp_path: Path):
    run = trainer(tmp_path, max_steps=3)
    before = run.rates.log_rates.detach().clone()
    run.train()
    run.save_model()
    assert (run.rates.log_rates != before).all()
    assert torch.equal(Sidecar.read(tmp_path).log_rates, run.rates.log_rates.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"learn_inner_lr": False},
        {"learn_inner_lr": False, "inner_lr_per_entry": True},
        {"algorithm": "imaml", "proximal": 5.0},
        {"algorithm": "reptile"},
        {"algorithm": "multitask"},
    ],
)
def test_rates_that_are_not_learned_stay(tmp_path: Path, options: dict):
    run = trainer(tmp_path, **options)
    run.train()
    assert torch.equal(run.rates.log_rates.exp(), torch.full((1, 16), 0.02).log().exp())
    assert len(run.optimizer.param_groups) == 1


def test_rates_per_step(tmp_path: Path):
    run = trainer(tmp_path, inner_steps=2, inner_lr_per_step=True, max_steps=3)
    run.train()
    assert run.rates.log_rates.shape == (2, 16)
    assert not torch.equal(run.rates.log_rates[0], run.rates.log_rates[1])


def test_rates_per_entry(tmp_path: Path):
    run = trainer(tmp_path, inner_lr_per_entry=True, fast_weights="lora_B", max_steps=3)
    run.train()
    entries = sum(p.numel() for n, p in run.loss_fn.weights.parameters().items() if "lora_B" in n)
    assert run.rates.log_rates.shape == (1, entries)
    assert len(run.rates.log_rates.detach().unique()) > entries / 2


def test_the_schedule_of_maml_plus_plus_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The algorithm that each outer step runs; accumulated batches belong to one step."""
    seen = []

    def noted(loss_fn, batch, algorithm, rates, **options):
        seen.append((type(algorithm).__name__, getattr(algorithm, "multi_step", None), algorithm.second_order))
        return meta_gradient(loss_fn, batch, algorithm, rates, **options)

    monkeypatch.setattr("meta_peft.outer_loop.outer_step.meta_gradient", noted)
    options = {"multitask_warmup_steps": 1, "first_order_until": 3, "multi_step_until": 4, "inner_steps": 2}
    trainer(tmp_path, max_steps=5, gradient_accumulation_steps=2, **options).train()
    expected = [("MultiTask", None, False), ("MAML", 0.75, False), ("MAML", 0.5, False), ("MAML", 0.25, True)]
    assert seen == [step for step in [*expected, ("MAML", 0.0, True)] for _ in range(2)]


def test_a_budget_of_memory_changes_nothing_but_memory(tmp_path: Path):
    options = {"per_device_train_batch_size": 3, **SMOOTH}
    small = trainer(tmp_path, memory_budget_gb=1e-6, **options)
    large = trainer(tmp_path, memory_budget_gb=1.0, **options)
    start = weights(large)
    small.train()
    large.train()
    assert small.memory_plan.settle(
        small.algorithm, small.loss_fn, Meta(dict(small.loss_fn.weights.parameters()), {}), batch_of(small)
    ) == (replace(small.algorithm, memory=0), 1)
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in weights(large).items() if "lora_B" in name)
    assert_close(weights(small), weights(large), 1e-6)


def test_a_frozen_cache_changes_nothing_but_time(tmp_path: Path):
    runs = {}
    for gb in (0, 0.1):
        model = peft_model(layers_to_transform=[1])
        run = trainer(tmp_path, model=model, eval_tasks=letter_tasks(EVAL), max_steps=12, frozen_cache_gb=gb, **SMOOTH)
        ran = []
        model.get_base_model().model.layers[0].mlp.register_forward_hook(
            lambda _, args, __, n=ran: n.append(len(args[0]))
        )
        run.train()
        runs[gb] = (run, run.evaluate(), sum(ran))
    (plain, before, all_rows), (mine, after, fewer) = runs.values()
    assert_close(weights(mine), weights(plain), 1e-6)
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert len(mine.frozen_cache) == fewer < 0.8 * all_rows
    assert len(plain.frozen_cache) == 0


def batch_of(run: MetaTrainer) -> EpisodeBatch:
    return run.data_collator([run.train_dataset[i] for i in range(run.args.per_device_train_batch_size)])


def test_warm_up_is_multitask_training(tmp_path: Path):
    warm = trainer(tmp_path, multitask_warmup_steps=2, **SMOOTH)
    warm.train()
    multitask = trainer(tmp_path, algorithm="multitask", **SMOOTH)
    multitask.train()
    assert_close(weights(warm), weights(multitask), 1e-6)
    proper = trainer(tmp_path, **SMOOTH)
    proper.train()
    difference = weights(proper)["log_rates"] - weights(multitask)["log_rates"]
    assert difference.abs().max() > 1e-3, "meta-training would have been no different"

    further = trainer(tmp_path, multitask_warmup_steps=2, max_steps=3, **SMOOTH)
    further.train()
    assert not torch.equal(further.rates.log_rates, multitask.rates.log_rates)  # learned from the third step on


@pytest.mark.parametrize("kind", ["dense", "4bit", "8bit"])
def test_the_base_is_never_written_to(tmp_path: Path, kind: str):
    model = peft_model(kind)
    before = fingerprint(model)
    run = trainer(tmp_path, model=model, eval_tasks=letter_tasks(EVAL))
    adapter = weights(run)
    run.train()
    run.evaluate()
    run.save_model()
    adapt(model, letter_tasks("p")["say p"][:2])
    model.set_adapter("default")
    model.delete_adapter("adapted")
    assert fingerprint(model) == before
    assert all(not torch.equal(new, adapter[name]) for name, new in weights(run).items() if "lora_B" in name)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_accumulation_is_a_larger_batch(tmp_path: Path):
    options = {"max_steps": 3, **SMOOTH}
    parts = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    whole = trainer(tmp_path, per_device_train_batch_size=4, **options)
    parts.train()
    whole.train()
    assert_close(weights(parts), weights(whole), 1e-6)
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_chunks_are_the_whole_batch(tmp_path: Path):
    chunks, whole = (trainer(tmp_path, per_device_train_batch_size=3, tasks_per_forward=n, **SMOOTH) for n in (1, None))
    start = weights(whole)
    chunks.train()
    whole.train()
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in weights(whole).items() if "lora_B" in name)
    assert_close(weights(chunks), weights(whole), 1e-6)


# ---- which tasks


def test_what_a_rule_is_told_is_what_training_computed(tmp_path: Path):
    """The loss of each task of the first step, and the direction of its gradient."""
    options = {"task_sampling": "by_difficulty", "per_device_train_batch_size": 3, "max_steps": 1}
    directed = {"task_sampling": "by_gradient_diversity", "deterministic_reduction": True}
    losses, directions = trainer(tmp_path, **options), trainer(tmp_path, **options | directed)
    batch = losses.data_collator([losses.train_dataset[i] for i in range(3)])
    expected = meta_gradient(losses.loss_fn, batch, losses.algorithm, losses.rates).metrics["loss"].tolist()
    losses.train()
    directions.train()
    rule, told = losses.train_dataset.sampling, dict(zip(batch.tasks, expected, strict=True))
    for number, name in enumerate(losses.train_dataset.tasks.names):
        assert rule.losses[number] == pytest.approx(told.get(name, 0.0), rel=1e-5)
        assert rule.seen[number] == (name in told)
    of_gradient = directions.train_dataset.sampling
    assert (of_gradient.seen == rule.seen).all()
    alone = trainer(tmp_path)
    for place, name in enumerate(batch.tasks):
        gradient = meta_gradient(alone.loss_fn, batch.part(place, place + 1), alone.algorithm, alone.rates)
        sketch = of_gradient._sketch(gradient.grads.adapter).numpy()
        direction = of_gradient.directions[alone.train_dataset.tasks.names.index(name)]
        assert direction @ sketch == pytest.approx(np.linalg.norm(sketch), rel=1e-4)


def test_hard_tasks_are_seen_more_often(tmp_path: Path):
    """One task whose answers are random among seven that all answer alike."""
    rng = np.random.default_rng(0)
    tasks = letter_tasks("abcdefg")
    tasks = {name: [{**row, "target": "aa"} for row in rows] for name, rows in tasks.items()}
    tasks["hard"] = [{**row, "target": "".join(rng.choice(list("bcdefgh"), 4))} for row in letter_tasks("h")["say h"]]
    run = trainer(tmp_path, tasks=tasks, task_sampling="by_difficulty", max_steps=50)
    seen = []
    update = run.train_dataset.sampling.update
    run.train_dataset.sampling.update = lambda notes: (seen.extend(run.train_dataset.sampling.draw()), update(notes))
    run.train()
    counts = np.bincount(seen, minlength=8)
    assert run.train_dataset.tasks.names[-1] == "hard"
    assert counts[-1] > 1.6 * counts[:-1].mean()
    assert counts[-1] > counts[:-1].max()


def test_a_curriculum_starts_with_what_the_base_finds_easy(tmp_path: Path):
    run = trainer(tmp_path, task_sampling="curriculum", max_steps=2, curriculum_steps=1000)
    run.train()
    rule = run.train_dataset.sampling
    alone = trainer(tmp_path)
    each = EpisodeDataset(alone.train_dataset.tasks, shots=2, query_size=2, seed=42, shuffle=False)
    batches = alone.batches(list(each))
    weights_of = {n: p.detach() for n, p in alone.loss_fn.weights.parameters().items()}
    expected = [float(loss) for batch in batches for loss in alone.loss_fn.scores(weights_of, batch.query).loss_T]
    assert rule.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert sorted(rule.draw(0)) == sorted(np.argsort(expected)[:2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task_sampling": "by_difficulty", "dataloader_num_workers": 1}, "workers read ahead"),
        ({"task_sampling": "by_gradient_diversity"}, "set deterministic_reduction=True"),
        ({"task_sampling": "hardest"}, "task_sampling must be one of uniform, by_size"),
        ({"task_leakage": "maybe"}, "task_leakage must be one of warn, error, ignore"),
        ({"frozen_cache_gb": 1, "deterministic_reduction": True}, "depend on which rows met first"),
        ({"frozen_cache_gb": -1}, "frozen_cache_gb must be a number of 0 or more"),
        ({"task_sampling": "curriculum", "curriculum_steps": 0}, "curriculum_steps must be a number of 1 or more"),
    ],
)
def test_choices_that_cannot_be(tmp_path: Path, options: dict, said: str):
    with pytest.raises(MetaPeftError, match=said):
        config(tmp_path, **options)


# ---- checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 1, "inner_lr_per_step": True},
        {"gradient_accumulation_steps": 2, "inner_lr_per_step": True},
        {"inner_lr_per_entry": True, "fast_weights": "lora_B", "multi_step_until": 5, "first_order_until": 2},
        {"algorithm": "imaml", "proximal": 5.0},
        {"task_sampling": "by_difficulty", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"task_sampling": "by_gradient_similarity", "deterministic_reduction": True, "per_device_train_batch_size": 5},
        {"task_sampling": "curriculum"},
        {"support_selection": "diverse"},
    ],
)
def test_resuming_gives_the_same_bits(tmp_path: Path, options: dict):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", **options}
    options |= {"inner_steps": 2}
    whole = trainer(tmp_path, **options)
    whole.train()

    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert bits(weights(resumed)) == bits(weights(whole))
    history = [
        [(line["step"], line["loss"]) for line in r.state.log_history if "loss" in line] for r in (resumed, whole)
    ]
    assert history[0] == history[1]


def test_a_checkpoint_of_another_choice_of_tasks_is_refused(tmp_path: Path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = trainer(tmp_path, max_steps=2, task_sampling="by_difficulty")
    with pytest.raises(MetaPeftError, match="chosen by Rounds, these options choose by ByDifficulty"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_with_other_rates_is_refused(tmp_path: Path):
    """One rate for all steps would go into a row for each step without a word."""
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = trainer(tmp_path, max_steps=2, inner_steps=2, inner_lr_per_step=True)
    with pytest.raises(MetaPeftError, match=r"checkpoint has inner rates of shape .* resume with the same inner_steps"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"learn_inner_lr": False}),
        ({"learn_inner_lr": False}, {}),
        ({}, {"algorithm": "reptile"}),
        ({}, {"algorithm": "fomaml"}),
        ({"learn_inner_lr": False}, {"algorithm": "reptile"}),
        ({"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine"}),
        ({}, {"optim": "sgd"}),
        ({"optim": "sgd"}, {}),
        ({"optim": "rmsprop_bnb"}, {"optim": "lion_32bit"}),
        (PLATEAU, {}),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_algorithm_optimizer_or_schedule_is_refused(tmp_path: Path, first: dict, then: dict):
    """torch finds out in the next step only, if at all."""
    both = {"eval_tasks": letter_tasks(EVAL), "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, max_steps=1, **both, **first).train()
    other = trainer(tmp_path, max_steps=2, **both, **then)
    with pytest.raises(MetaPeftError, match="resume with the options that the checkpoint was made with, such as"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path: Path):
    """Its episodes would be others than those that the run had."""
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    tasks = letter_tasks(TRAIN)
    tasks["say a"].pop()
    fewer = trainer(tmp_path, max_steps=2, tasks=tasks)
    said = r"The training tasks \(8 of 64 rows\) of .*checkpoint-1 is not that of these options: .* with the same tasks"
    with pytest.raises(MetaPeftError, match=said):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path):
    run = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    sidecar = tmp_path / "checkpoint-1" / "meta_peft.json"
    values = json.loads(sidecar.read_text())
    values["base"]["sizes"]["hidden_size"] = 32
    sidecar.write_text(json.dumps(values))
    checkpoints.seal(sidecar.parent)
    with pytest.raises(MetaPeftError, match="load the base model the adapter belongs to"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_another_run_in_the_folder_with_a_higher_step(tmp_path: Path):
    """Once it was resumed instead of the run that was stopped, whose checkpoints `save_total_limit` removed."""
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    earlier, kept = tmp_path / "checkpoint-4", tmp_path / "kept"
    trainer(tmp_path, max_steps=4, learning_rate=0.1, **saves).train()
    shutil.copytree(earlier, kept)
    os.utime(earlier, (1, 1))
    trainer(tmp_path, max_steps=1, **saves).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]

    shutil.copytree(kept, earlier)
    resumed, whole = trainer(tmp_path, max_steps=3), trainer(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert bits(weights(resumed)) == bits(weights(whole))


def test_the_best_checkpoint_comes_back(tmp_path: Path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), max_steps=4, learning_rate=0.5, **options)
    run.train()
    losses = {line["step"]: line["eval_loss"] for line in run.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < 4, "a learning rate of 0.5 should have spoilt the last step"
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert bits(dict(run.loss_fn.weights.parameters())) == bits(
        {name: saved[name] for name in weights(run) if name in saved}
    )


@pytest.mark.parametrize("more", [{}, {"save_only_model": True}], ids=str)
def test_the_best_checkpoint_is_one_of_this_run(tmp_path: Path, more: dict):
    """Once it was an earlier run's, where that had saved one after the outer step that was best, and this run had not."""
    used, new = tmp_path / "used", tmp_path / "new"
    trainer(used, max_steps=4, seed=7, save_strategy="steps", save_steps=1, **more).train()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5}
    runs = [trainer(folder, eval_tasks=letter_tasks(EVAL), **options | more) for folder in (used, new)]
    for run in runs:
        run.train()
        assert run.state.best_global_step < 4, "a learning rate of 0.5 should have spoilt the last step"
        assert run.state.best_model_checkpoint is None
    assert bits(weights(runs[0])) == bits(weights(runs[1]))


class Signalled(TrainerCallback):
    """SIGTERM comes in the evaluation after an outer step."""

    def __init__(self, step: int):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_keeps_its_last_checkpoint_beside_the_best(tmp_path: Path):
    """Once the Trainer removed it, as it does at the end of training where save_total_limit is 1."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), callbacks=[Signalled(2)], **options)
    run.train()
    assert run.interrupted == signal.SIGTERM
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert run.args.save_total_limit == 1
    resumed = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1, "training is over"
    whole = trainer(tmp_path / "whole", eval_tasks=letter_tasks(EVAL), **options)
    whole.train()
    assert bits(weights(resumed)) == bits(weights(whole))


# ---- evaluation


def test_evaluate_reports_before_and_after(learned: MetaTrainer):
    metrics = learned.evaluate()
    assert set(metrics) == {"eval_loss_before", "eval_loss", "eval_worst_loss", "eval_exact_match"}
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["eval_worst_loss"] >= metrics["eval_loss"]
    assert 0 <= metrics["eval_exact_match"] <= 1
    assert learned.state.log_history[-1].items() >= metrics.items()
    other = learned.evaluate(letter_tasks("mn"), metric_key_prefix="test")
    assert set(other) == {name.replace("eval_", "test_") for name in metrics}
    assert other["test_loss"] != metrics["eval_loss"]
    assert learned.evaluate() == metrics  # the same episodes each time


def test_evaluate_by_another_metric(tmp_path: Path):
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), metric="cer", max_new_tokens=2, **LEARNS)
    run.train()
    metrics = run.evaluate()
    assert set(metrics) == {"eval_loss_before", "eval_loss", "eval_worst_loss", "eval_cer"}
    assert 0 < metrics["eval_cer"] <= 1  # two characters for two: longer answers could be more than all wrong
    assert not run.scorer.loss_fn.second_order
    assert run.loss_fn.second_order


def test_evaluation_takes_the_steps_of_training(tmp_path: Path):
    """Through the fastest attention there is, where training runs one that can be differentiated twice."""
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), **LEARNS)
    batches = run.batches(run.eval_dataset.by_length())
    found, expected = (curve(loss_fn, run.start(), batches, [3]) for loss_fn in (run.scorer.loss_fn, run.loss_fn))
    assert (found.loss != expected.loss).any()  # sums in another order
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)


def test_evaluate_without_tasks_is_an_error(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="no tasks to evaluate on: give eval_dataset"):
        trainer(tmp_path).evaluate()


# ---- what it takes


@pytest.mark.parametrize("form", ["dataset", "mapping", "rows", "jsonl", "taskset"])
def test_tasks_in_any_form(tmp_path: Path, form: str):
    tasks = letter_tasks("abc")
    rows = [{"task": name, **row} for name, of_task in tasks.items() for row in of_task]
    source = {
        "dataset": lambda: Dataset.from_list(rows),
        "mapping": lambda: tasks,
        "rows": lambda: rows,
        "jsonl": lambda: write_jsonl(tmp_path / "tasks.jsonl", tasks),
        "taskset": lambda: TaskSet.from_rows(rows),
    }[form]()
    run = trainer(tmp_path, tasks=source)
    assert run.train_dataset.tasks.names == list(tasks)
    assert len(run.train_dataset) == 4  # two steps of two tasks
    run.train()
    assert run.state.global_step == 2


def test_another_task_column(tmp_path: Path):
    file = write_jsonl(tmp_path / "tasks.jsonl", letter_tasks("abc"), column="family")
    assert trainer(tmp_path, tasks=file, task_column="family").train_dataset.tasks.names == ["say a", "say b", "say c"]
    with pytest.raises(MetaPeftError, match=r"Expected a column 'task'.*'family'"):
        trainer(tmp_path, tasks=file)


def test_shared_tasks_are_refused(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="1 tasks are in both the training and the evaluation tasks, 'say c'"):
        trainer(tmp_path, tasks=letter_tasks("abc"), eval_tasks=letter_tasks("cd"))


def test_too_few_rows_are_refused(tmp_path: Path):
    tasks = letter_tasks("a") | letter_tasks("b", n=3)
    with pytest.raises(MetaPeftError, match=r"'say b' has 3 distinct rows.*2 support rows and 2 query rows"):
        trainer(tmp_path, tasks=tasks)


def test_a_name_and_a_lora_config(tmp_path: Path):
    """The base and its tokenizer are found by the name."""
    run = MetaTrainer(
        str(tiny_folder()),
        config(tmp_path),
        train_dataset=letter_tasks(TRAIN),
        peft_config=lora(target_modules=["q_proj"]),
    )
    run.train()
    run.save_model()
    assert isinstance(run.model, PeftModel)
    assert len(run.loss_fn.weights.parameters()) == 4  # A and B in two layers
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder())


def test_a_model_and_a_lora_config(tmp_path: Path):
    run = MetaTrainer(
        base_model(),
        config(tmp_path),
        train_dataset=letter_tasks(TRAIN),
        peft_config=lora(),
        processing_class=tiny_tokenizer(),
    )
    assert len(run.loss_fn.weights.parameters()) == 16


def test_lora_is_said_once(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"give peft_config=LoraConfig\(\.\.\.\), or a PeftModel"):
        MetaTrainer(base_model(), config(tmp_path), processing_class=tiny_tokenizer())
    with pytest.raises(MetaPeftError, match="is a PeftModel already: leave peft_config out"):
        MetaTrainer(peft_model(), config(tmp_path), peft_config=lora(), processing_class=tiny_tokenizer())


def test_targets_that_match_nothing(tmp_path: Path):
    with pytest.raises(
        MetaPeftError, match=r"lora_target_modules=\['query'\].*called \['down_proj', .* in layers 0 to 2 - 1"
    ):
        MetaTrainer(base_model(), config(tmp_path), peft_config=lora(target_modules=["query"]))
    with pytest.raises(MetaPeftError, match=r"with lora_layers=\[7\] match no layer"):
        MetaTrainer(base_model(), config(tmp_path), peft_config=lora(layers_to_transform=[7]))


def test_callbacks_see_the_run(tmp_path: Path):
    class Seen(TrainerCallback):
        def __init__(self):
            self.steps, self.logs = 0, []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(set(logs))

    seen = Seen()
    trainer(tmp_path, callbacks=[seen], max_steps=3, logging_steps=2).train()
    assert seen.steps == 3
    assert seen.logs[0] >= {"loss", "grad_norm", "learning_rate"}


def test_the_progress_bar_shows_the_loss_before_and_after(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer(tmp_path, disable_tqdm=False).train()
    assert re.search(r"loss \d\.\d+ -> \d\.\d+", capsys.readouterr().err)


def test_the_progress_bar_is_quiet_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(tmp_path, disable_tqdm=False).train()
    assert "loss" not in capsys.readouterr().err


# ---- what it leaves


def test_the_saved_folder(tmp_path: Path):
    run = trainer(tmp_path)
    run.train()
    run.record(rate_factors={3: 2.0}, results=CardResults("| a table |"))
    run.save_model()
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "meta_peft.json", "meta_peft.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files
    card = (tmp_path / "README.md").read_text()
    assert str(tiny_folder()) not in card
    assert "library_name: peft" in card
    assert "| a table |" in card
    assert Sidecar.read(tmp_path).rate_factors == {3: 2.0}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert bits(saved) == {name: bits(weights(run))[name] for name in sorted(saved)}

    model, metrics = adapt(load(str(tiny_folder()), tmp_path), letter_tasks("p")["say p"][:2])
    straight, same = adapt(run.model, letter_tasks("p")["say p"][:2])
    assert metrics == same
    assert model.active_adapters == straight.active_adapters == ["adapted"]


ANIL = {"fast_weights": "lora_B", "inner_lr_per_entry": True, "inner_optimizer": "sgd", "inner_lr": 0.1}


@pytest.fixture(scope="module")
def anil_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B matrices adapt, each entry by a rate of its own."""
    folder = tmp_path_factory.mktemp("anil")
    run = trainer(folder, inner_max_grad_norm=5.0, **ANIL)
    run.train()
    run.save_model()
    return folder


def test_fast_weights_alone_move_at_use_and_each_entry_by_its_own_rate(anil_folder: Path):
    model = load(None, anil_folder)
    sidecar = model.meta_peft.sidecar
    assert (sidecar.inner.fast, sidecar.inner.clip, sidecar.inner.rates_per_entry) == ("lora_B", 5.0, True)
    before = {n: p.detach().clone() for n, p in FastWeights(model).parameters().items()}
    fast = {n: p for n, p in before.items() if "lora_B" in n}
    assert sidecar.log_rates.shape == (1, sum(p.numel() for p in fast.values()))

    log_rates = sidecar.log_rates.clone()
    log_rates[:, ::3] = -torch.inf  # a rate of zero
    model.meta_peft = replace(model.meta_peft, sidecar=replace(sidecar, log_rates=log_rates))
    _, metrics = adapt(model, letter_tasks("p")["say p"][:3], steps=2)
    assert metrics["support_loss_after"] < metrics["support_loss_before"]
    after = FastWeights(model, "adapted").parameters()
    assert all(torch.equal(after[n], p) for n, p in before.items() if n not in fast)
    moved = torch.cat([(after[n] != p).flatten() for n, p in fast.items()])
    assert not moved[::3].any()
    others = torch.ones_like(moved)
    others[::3] = False
    assert moved[others].float().mean() > 0.9  # some gradients are exactly zero


def test_what_is_loaded_adapts_as_what_was_trained(tmp_path: Path, anil_folder: Path):
    run = trainer(tmp_path, inner_max_grad_norm=5.0, **ANIL)
    run.train()
    support = letter_tasks("p")["say p"][:3]
    trained, metrics = adapt(run.model, support)
    loaded, same = adapt(load(None, anil_folder), support)
    assert same == metrics
    found = [dict(FastWeights(model, "adapted").parameters()) for model in (loaded, trained)]
    assert bits(found[0]) == bits(found[1])


def test_a_wrong_number_of_rates_is_refused(tmp_path: Path, anil_folder: Path):
    shutil.copytree(anil_folder, tmp_path / "damaged")
    rates = load_file(anil_folder / "meta_peft.safetensors")["log_rates"]
    save_file({"log_rates": rates[:, :-1].contiguous()}, tmp_path / "damaged" / "meta_peft.safetensors")
    number = rates.shape[1]
    with pytest.raises(
        MetaPeftError, match=f"The sidecar has {number - 1} rates, the adapter's fast weights need {number}"
    ):
        load(None, tmp_path / "damaged")


def test_the_card_and_the_shell_say_what_adapts(anil_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert "rates learned, one for each entry of a LoRA matrix." in (anil_folder / "README.md").read_text()
    assert main(["inspect", "--adapter", str(anil_folder)]) == 0
    written = capsys.readouterr().out
    assert "fast weights    8 of them, those with 'lora_B' in their names" in written
    assert "lora_A.weight" not in written
    assert "lora_B.weight" not in written  # rates of entries are too many to list


def test_evaluation_adapts_fast_weights(tmp_path: Path):
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), fast_weights="lora_B", **LEARNS)
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def test_a_checkpoint_is_an_adapter_too(tmp_path: Path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert names >= {"adapter_model.safetensors", "meta_peft.json", "state.safetensors", "trainer_state.json"}
    load(str(tiny_folder()), tmp_path / "checkpoint-1")


# ---- what a notebook does


def test_what_was_trained_is_saved_though_another_adapter_is_active(tmp_path: Path):
    """Once the weights that `adapt` had made for one task were saved as the meta-learned ones."""
    learned = trainer(tmp_path)
    learned.train()
    learned.save_model(str(tmp_path / "before"))
    adapt(learned.model, letter_rows("m", 3))
    assert learned.model.active_adapters == ["adapted"]
    learned.save_model(str(tmp_path / "after"))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert bits(before) == bits(after)
    assert learned.model.meta_peft.adapter == "default"


def test_training_twice_is_training_on(tmp_path: Path):
    learned = trainer(tmp_path, learning_rate=0.01)
    learned.train()
    once = learned.start()
    learned.train()
    twice = learned.start()
    assert bits(once.adapter) != bits(twice.adapter)
    assert not torch.equal(once.hyper["log_rates"], twice.hyper["log_rates"])


def test_the_seed_decides_where_lora_starts(tmp_path: Path):
    def start(seed: int) -> dict[str, bytes]:
        torch.manual_seed(time.monotonic_ns() % 2**31)  # whatever came before
        args = config(tmp_path, seed=seed)
        return bits(
            MetaTrainer(base_model(), args, processing_class=tiny_tokenizer(), peft_config=lora()).start().adapter
        )

    assert start(1) == start(1) != start(2)


def test_an_optimizer_without_the_rates_is_refused(tmp_path: Path):
    """They would never be learned."""

    def given(**options) -> MetaTrainer:
        model = peft_model()
        tasks, args = letter_tasks(TRAIN), config(tmp_path, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return MetaTrainer(model, args, tasks, processing_class=tiny_tokenizer(), optimizers=(optimizer, None))

    with pytest.raises(MetaPeftError, match="does not hold the inner learning rates"):
        given().train()
    learned = given(learn_inner_lr=False)
    before = learned.start()
    learned.train()
    assert bits(before.adapter) != bits(learned.start().adapter)


@pytest.mark.parametrize("model", ["a name", "a model"])
def test_a_task_type_of_another_kind_of_model_is_refused(tmp_path: Path, model: str):
    """A causal model would be trained, and never loaded again."""
    given, task_type = (tiny_folder(), "SEQ_2_SEQ_LM") if model == "a name" else (base_model(), "SEQ_CLS")
    with pytest.raises(MetaPeftError, match=f"task_type='{task_type}' does not fit"):
        MetaTrainer(given, config(tmp_path), letter_tasks(TRAIN), peft_config=LoraConfig(task_type=task_type))


def test_a_named_base_gets_the_head_that_the_task_type_says(tmp_path: Path):
    """For as many classes as the task with the most has."""
    tasks = {f"{n} classes": [{"text": f"{c}{i}", "label": c} for c in "abcd"[:n] for i in range(4)] for n in (2, 4, 3)}
    lora_config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    run = MetaTrainer(str(tiny_folder()), config(tmp_path), tasks, peft_config=lora_config)
    assert run.model.get_base_model().config.num_labels == 4
    run.train()
    run.save_model()
    _, metrics = adapt(load(None, tmp_path), tasks["3 classes"])
    assert metrics["support_loss_after"] < metrics["support_loss_before"]


def test_there_is_no_predict(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"meta_peft\.adapt gives a model for one task"):
        trainer(tmp_path).predict(letter_tasks(EVAL))


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(MetaPeftError, match=r"lora_A.weight is \[4, .*resume with the same lora_r"):
        trainer(tmp_path, model=peft_model(r=2)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
