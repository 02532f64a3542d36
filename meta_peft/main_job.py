"""The main job: meta-train on many tasks, adapt to held-out ones, compare with what one would do instead, save."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, set_seed

from meta_peft.base_model import load_base, load_tokenizer, lora_config, with_adapter
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.errors import MetaPeftError
from meta_peft.evaluate import Curve, Start, tune, tuned_curve
from meta_peft.in_context import in_context_scores
from meta_peft.report import Report
from meta_peft.tasks import TaskSet
from meta_peft.trainer import MetaTrainer
from meta_peft.types import Episode, EpisodeBatch

logger = logging.getLogger("meta_peft")

RECORDED = (
    *("algorithm", "shots", "query_size", "eval_query_size", "inner_steps", "inner_optimizer", "inner_lr"),
    *("learn_inner_lr", "inner_lr_per_step", "inner_adam_eps_root", "inner_lr_learning_rate", "max_steps"),
    *("multitask_warmup_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "max_grad_norm"),
    *("seed", "world_size", "prompt_template", "completion_template"),
)


@dataclass
class CompareArguments:
    """What the trained adapter is compared with on held-out tasks."""

    compare: str = field(
        default="plain",
        metadata={"help": "plain: with plain LoRA. full: also multi-task LoRA and in-context examples. none: nothing."},
    )
    adaptation_steps: list[int] = field(
        default_factory=lambda: [0, 1, 3, 10], metadata={"help": "Numbers of adaptation steps in the table."}
    )
    rate_factors: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0],
        metadata={"help": "Multiples of the inner rates to choose from on validation tasks, for every start alike."},
    )
    max_validation_tasks: int = field(default=12, metadata={"help": "Validation tasks that rates are chosen on."})
    max_test_tasks: int = field(default=48, metadata={"help": "Held-out tasks in the table."})

    def __post_init__(self) -> None:
        if self.compare not in ("none", "plain", "full"):
            raise MetaPeftError(f"compare must be none, plain or full; got {self.compare!r}.")
        if not self.adaptation_steps or min(self.adaptation_steps) < 0:
            raise MetaPeftError(f"adaptation_steps must be numbers of 0 or more; got {self.adaptation_steps}.")
        if not self.rate_factors or min(self.rate_factors) <= 0:
            raise MetaPeftError(f"rate_factors must be positive numbers; got {self.rate_factors}.")


def run(
    model_args: ModelArguments, task_args: TaskArguments, args: MetaLoraConfig, comparison: CompareArguments
) -> Report | None:
    """Train, save to `args.output_dir`, compare, and write table and plot there."""
    tasks = load_tasks(task_args, args.task_column)
    tasks["train"].check_rows(args.shots, args.query_size)
    base = load_base(model_args)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
    )
    set_seed(args.seed)  # the LoRA A matrices start at random
    trainer = MetaTrainer(
        with_adapter(base, lora_config(model_args)),
        args=args,
        train_dataset=tasks["train"],
        eval_dataset=tasks.get("validation"),
        processing_class=tokenizer,
    )
    plain = trainer.start("plain LoRA")
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.monotonic() - began
    trainer.save_model()
    if comparison.compare == "none" or "validation" not in tasks or "test" not in tasks:
        return None

    learned = trainer.start("meta-learned LoRA")
    starts = [plain, learned]
    if comparison.compare == "full":  # trained by all processes together
        starts.insert(1, _multitask_start(trainer, model_args, tasks))
    if args.process_index:
        return None
    validation = trainer.batches(_held_out(trainer, tasks["validation"], comparison.max_validation_tasks))
    test_episodes = _held_out(trainer, tasks["test"], comparison.max_test_tasks)
    test = trainer.batches(test_episodes)
    steps = sorted(set(comparison.adaptation_steps))
    curves = {s.name: _curve(trainer, s, validation, test, steps, comparison.rate_factors) for s in starts}
    in_context = None
    if comparison.compare == "full":
        in_context = in_context_scores(trainer.loss_fn, plain.adapter, test_episodes, trainer.data_collator, tokenizer)
    report = Report(
        [episode.task for episode in test_episodes],
        curves,
        _about(model_args, task_args, args, tasks, seconds),
        in_context,
    )
    found = curves[learned.name]
    trainer.record(
        rate_factors={k: f for k, f in zip(found.steps, found.factors, strict=True) if f is not None},
        results={"table": report.markdown()},
    )
    trainer.save_model()
    report.write(Path(str(args.output_dir)))
    print(f"\nHeld-out tasks: {found.loss.shape[0]}, {args.shots} examples each.\n\n{report.markdown()}\n")
    print(f"Adapter, table and plot are in {args.output_dir}.")
    return report


def load_tasks(task_args: TaskArguments, task_column: str) -> dict[str, TaskSet]:
    """Tasks by split, each pair of splits disjoint."""
    if task_args.train_tasks == "locale_formatting":
        from meta_peft.tasks.locale_formatting import locale_formatting

        return dict(locale_formatting())
    named = {"train": task_args.train_tasks, "validation": task_args.validation_tasks, "test": task_args.test_tasks}
    tasks = {split: TaskSet.from_jsonl(path, task_column) for split, path in named.items() if path}
    splits = list(tasks)
    for i, split in enumerate(splits):
        for other in splits[i + 1 :]:
            tasks[split].check_disjoint(tasks[other], (split, other))
    return tasks


def _multitask_start(of: MetaTrainer, model_args: ModelArguments, tasks: dict[str, TaskSet]) -> Start:
    """The hard baseline: one LoRA for all tasks, from the same episodes and more, for the same compute."""
    args = of.args
    own = copy.copy(args)
    own.algorithm = "multitask"
    n_layers, below = of.loss_fn.layers()
    warmup = min(args.multitask_warmup_steps, args.max_steps)  # these cost what a step of multi-task training costs
    own.max_steps = warmup + round((args.max_steps - warmup) * compute_ratio(n_layers, n_layers - below, args))
    own.save_strategy = SaveStrategy.NO
    own.eval_strategy = IntervalStrategy.NO
    set_seed(args.seed)
    trainer = MetaTrainer(
        with_adapter(load_base(model_args), lora_config(model_args)),
        args=own,
        train_dataset=tasks["train"],
        processing_class=of.processing_class,
    )
    trainer.train()
    return trainer.start("multi-task LoRA")


def compute_ratio(n_layers: int, adapted: int, args: MetaLoraConfig) -> float:
    """How many steps of multi-task training cost as much as one outer step of `args.algorithm`.

    Counted in matrix products of a row with a layer. Layers below the lowest adapted one are run once a row; in the
    `adapted` ones and those between, a forward and a backward are two products, and a second-order inner step is four.
    """
    support, query, below = args.shots, args.query_size, n_layers - adapted
    inner = {"maml": 4, "fomaml": 2, "reptile": 2, "multitask": 0}[args.algorithm] * args.inner_steps
    rows = support + query
    last = 2 * query if args.algorithm in ("maml", "fomaml") else 0
    inner_rows = rows if args.algorithm == "reptile" else support
    if args.algorithm == "multitask":
        return 1.0
    return (rows * below + adapted * (inner * inner_rows + last)) / (rows * below + adapted * 2 * rows)


def _first(tasks: TaskSet, n: int, seed: int = 0) -> TaskSet:
    """At most n tasks, drawn without regard to their order."""
    names = tasks.names
    chosen = np.random.default_rng(seed).permutation(len(names))[:n]
    return tasks.select(names[i] for i in sorted(chosen))


def _held_out(trainer: MetaTrainer, tasks: TaskSet, n: int) -> list[Episode]:
    return trainer.evaluation_episodes(_first(tasks, n)).by_length()


def _curve(
    trainer: MetaTrainer,
    start: Start,
    validation: list[EpisodeBatch],
    test: list[EpisodeBatch],
    steps: list[int],
    factors: list[float],
) -> Curve:
    n_validation, n_test = (sum(batch.n_tasks for batch in batches) for batches in (validation, test))
    with tqdm(total=n_validation * len(factors) + n_test, desc=start.name, unit="task", dynamic_ncols=True) as bar:
        chosen = tune(trainer.loss_fn, start, validation, steps, factors, progress=bar.update)
        bar.total = n_validation * len(factors) + n_test * len(set(chosen.values()))
        return tuned_curve(trainer.loss_fn, start, test, chosen, progress=bar.update)


def _about(
    model_args: ModelArguments,
    task_args: TaskArguments,
    args: MetaLoraConfig,
    tasks: dict[str, TaskSet],
    seconds: float,
) -> dict[str, Any]:
    """What a reader needs to run it again."""
    return {
        "model": asdict(model_args),
        "tasks": {**asdict(task_args), **{f"n_{split}": len(t) for split, t in tasks.items()}},
        "training": {name: getattr(args, name) for name in RECORDED},
        "training_seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")},
    }
