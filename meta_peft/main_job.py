"""The main job: meta-train on many tasks, adapt to held-out ones, compare with what one would do instead, save."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meta_peft.base_model import new_model, tokenizer_for
from meta_peft.compare import CompareArguments, compare, multitask_start
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.processes import group
from meta_peft.report import Report
from meta_peft.sharding import asked_for, check_sharding
from meta_peft.task_loading import load_tasks, with_enough_rows
from meta_peft.tasks import TaskSet
from meta_peft.tasks.leakage import check_leakage
from meta_peft.trainer import MetaTrainer

RECORDED = (
    *("algorithm", "shots", "query_size", "eval_query_size", "inner_steps", "inner_optimizer", "inner_lr"),
    *("learn_inner_lr", "inner_lr_per_step", "inner_lr_per_entry", "inner_adam_eps_root", "inner_momentum"),
    *("inner_weight_decay", "inner_max_grad_norm", "fast_weights", "inner_lr_learning_rate", "second_order_steps"),
    *("first_order_until", "multi_step_until", "proximal", "implicit_solver", "implicit_iterations", "memory"),
    *("max_steps", "multitask_warmup_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type"),
    *("max_grad_norm", "seed", "world_size", "prompt_template", "completion_template", "metric", "choice_score"),
    *("task_sampling", "sampling_temperature", "sampling_exploration", "curriculum_steps", "support_selection"),
    *("context_template", "assistant_turns", "task_column", "ways", "label_words"),
)


def run(
    model_args: ModelArguments, task_args: TaskArguments, args: MetaLoraConfig, comparison: CompareArguments
) -> Report | None:
    """Train, save to `args.output_dir`, compare, and write table and plot there."""
    _check_base(model_args, args)
    tasks = load_tasks(task_args, args.task_column)
    leakage = group.of_first(partial(check_leakage, tasks, args.task_leakage))
    tasks = with_enough_rows(tasks, task_args, args)
    tokenizer = tokenizer_for(model_args)
    trainer = MetaTrainer(
        new_model(model_args, args.seed),
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
    if trainer.interrupted is not None:
        print(f"Stopped by a signal. To go on: --output_dir {args.output_dir} --resume_from_checkpoint True")
        raise SystemExit(128 + trainer.interrupted)
    if comparison.compare == "none" or "validation" not in tasks or "test" not in tasks:
        return None

    learned = trainer.start("meta-learned LoRA")
    starts = [plain, learned]
    if comparison.compare == "full":  # trained by all processes together
        starts.insert(1, multitask_start(trainer, tasks["train"], partial(new_model, model_args, args.seed)))
    if args.process_index and not asked_for():
        return None
    report = compare(trainer, starts, tasks, comparison)  # on a sharded base by all processes together
    if args.process_index:
        return None
    report = replace(report, run={**_about(model_args, task_args, args, tasks, seconds), "leakage": leakage.to_dict()})
    found = report.curves[learned.name]
    trainer.record(
        rate_factors={k: f for k, f in zip(found.steps, found.factors, strict=True) if f is not None},
        results={"table": report.markdown()},
    )
    trainer.save_model()
    report.write(Path(str(args.output_dir)))
    print(f"\nHeld-out tasks: {len(report.tasks)}, {args.shots} examples each.\n\n{report.markdown()}\n")
    print(f"Adapter, table and plot are in {args.output_dir}.")
    return report


def _check_base(model_args: ModelArguments, args: MetaLoraConfig) -> None:
    """What cannot work where the base is to be kept is refused before it is loaded."""
    sharding = asked_for()
    back_end = sharding.back_end if sharding else "device_map" if model_args.device_map else None
    if back_end:
        check_sharding(back_end, model_args.quantisation, args.algorithm_object())


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
        "data": {split: t.found for split, t in tasks.items()},
        "training": {name: getattr(args, name) for name in RECORDED},
        "training_seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")},
    }
