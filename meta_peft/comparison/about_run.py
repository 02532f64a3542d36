"""What a run was: what a reader of its results needs to run it again."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.tasks import TaskSet

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


def about_run(
    model_args: ModelArguments,
    task_args: TaskArguments,
    args: MetaLoraConfig,
    tasks: dict[str, TaskSet],
) -> dict[str, Any]:
    """What a reader needs to run it again."""
    return {
        "model": asdict(model_args),
        "tasks": {**asdict(task_args), **{f"n_{split}": len(t) for split, t in tasks.items()}},
        "data": {split: t.found for split, t in tasks.items()},
        "training": {name: getattr(args, name) for name in RECORDED},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")},
    }
