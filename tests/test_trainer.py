from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import fingerprint
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from surface import (
    EVAL,
    TRAIN,
    base_model,
    bits,
    config,
    letter_tasks,
    lora,
    peft_model,
    tiny_folder,
    tiny_tokenizer,
    trainer,
    write_jsonl,
)
from transformers import TrainerCallback

from meta_peft import LearnedRates, MetaPeftError, MetaTrainer, TaskSet, assign_gradient, load, meta_gradient
from meta_peft.adaptation import adapt
from meta_peft.adapter_loss import AdapterLoss
from meta_peft.sidecar import Sidecar

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


def test_the_loss_goes_down_and_the_log_says_so(tmp_path: Path):
    run = trainer(tmp_path, **LEARNS)
    run.train()
    log = [line for line in run.state.log_history if "loss" in line]
    assert [line["step"] for line in log] == list(range(1, 21))
    assert all(line["grad_norm"] > 0 and line["learning_rate"] == 0.01 for line in log)
    first, last = (sum(line["loss"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "multitask"])
def test_every_algorithm_learns_what_its_own_loop_learns(tmp_path: Path, algorithm: str):
    """MetaTrainer is glue: three steps of it are three AdamW steps on `meta_gradient`, the rates clipped apart."""
    options = {"algorithm": algorithm, "max_steps": 3, "max_grad_norm": 0.5, "inner_lr_learning_rate": 0.1}
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
        gradient = meta_gradient(loss_fn, batch, args.algorithm_object(), rates)
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


@pytest.mark.parametrize("options", [{"learn_inner_lr": False}, {"algorithm": "reptile"}, {"algorithm": "multitask"}])
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


# ---- checkpoints


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_gives_the_same_bits(tmp_path: Path, accumulation: int):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    options |= {"gradient_accumulation_steps": accumulation, "inner_lr_per_step": True, "inner_steps": 2}
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


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path):
    run = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    sidecar = tmp_path / "checkpoint-1" / "meta_peft.json"
    values = json.loads(sidecar.read_text())
    values["base"]["sizes"]["hidden_size"] = 32
    sidecar.write_text(json.dumps(values))
    with pytest.raises(MetaPeftError, match="load the base model the adapter belongs to"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


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


# ---- evaluation


def test_evaluate_reports_before_and_after(tmp_path: Path):
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL), **LEARNS)
    run.train()
    metrics = run.evaluate()
    assert set(metrics) == {"eval_loss_before", "eval_loss", "eval_worst_loss", "eval_exact_match"}
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["eval_worst_loss"] >= metrics["eval_loss"]
    assert 0 <= metrics["eval_exact_match"] <= 1
    assert run.state.log_history[-1].items() >= metrics.items()
    other = run.evaluate(letter_tasks("mn"), metric_key_prefix="test")
    assert set(other) == {name.replace("eval_", "test_") for name in metrics}
    assert other["test_loss"] != metrics["eval_loss"]
    assert run.evaluate() == metrics  # the same episodes each time


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


def test_the_progress_bar_shows_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(tmp_path, disable_tqdm=False).train()
    assert "loss=" in capsys.readouterr().err


# ---- what it leaves


def test_the_saved_folder(tmp_path: Path):
    run = trainer(tmp_path)
    run.train()
    run.record(rate_factors={3: 2.0}, results={"table": "| a table |"})
    run.save_model()
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "meta_peft.json", "meta_peft.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files
    card = (tmp_path / "README.md").read_text()
    assert f"base_model: {tiny_folder()}" in card
    assert "library_name: peft" in card
    assert "| a table |" in card
    assert Sidecar.read(tmp_path).rate_factors == {3: 2.0}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert bits(saved) == {name: bits(weights(run))[name] for name in sorted(saved)}

    model, metrics = adapt(load(str(tiny_folder()), tmp_path), letter_tasks("p")["say p"][:2])
    straight, same = adapt(run.model, letter_tasks("p")["say p"][:2])
    assert metrics == same
    assert model.active_adapters == straight.active_adapters == ["adapted"]


def test_a_checkpoint_is_an_adapter_too(tmp_path: Path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert names >= {"adapter_model.safetensors", "meta_peft.json", "optimizer.pt", "trainer_state.json"}
    load(str(tiny_folder()), tmp_path / "checkpoint-1")
