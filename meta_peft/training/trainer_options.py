"""What `transformers.Trainer` would stumble over late, and with any error: told before a base is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from meta_peft.config import MetaLoraConfig
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.metrics import LOSSES, default_metric
from meta_peft.training.checkpointed_trainer import CheckpointedTrainer


def check_optimizer(args: MetaLoraConfig, given: tuple[Any, Any] = (None, None)) -> None:
    """Make the outer optimizer and its schedule, of a single number.

    Args:
        args: options of the run.
        given: an optimizer and a schedule that are taken in place of those that `args` name.

    Raises:
        MetaPeftError: a library that is not installed, an option that there is not, or one that is missing.
    """
    single = [torch.nn.Parameter(torch.zeros(1, device=args.device))]

    def optimizer() -> Any:
        kind, options = CheckpointedTrainer.get_optimizer_cls_and_kwargs(args, None)
        return kind(single, **options)

    def schedule() -> Any:
        return get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD(single, lr=1.0),
            num_warmup_steps=0,
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    for of, option, more in (
        (optimizer, "optim", "optim_args"),
        (schedule, "lr_scheduler_type", "lr_scheduler_kwargs"),
    ):
        if given[option != "optim"] is None:
            _check_can_be_made(of, args, option, more)


def check_evaluation(args: MetaLoraConfig, *, validation: bool) -> None:
    """Raise if there is to be an evaluation during training, and there are no tasks for it; or if the best checkpoint is
    wanted of a training that has no evaluation.

    Args:
        args: options of the run.
        validation: whether there are validation tasks.
    """
    if args.eval_strategy != "no" and not validation:
        raise MetaPeftError(
            f"eval_strategy={_name(args.eval_strategy)} evaluates on validation tasks, and there are none: give"
            " validation_tasks (in Python eval_dataset), or set eval_strategy=no."
        )
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise MetaPeftError(
            "load_best_model_at_end takes the checkpoint that evaluates best, and eval_strategy=no evaluates none: set"
            " eval_strategy and save_strategy to steps, or leave load_best_model_at_end out."
        )
    if args.save_strategy == "best" and (args.eval_strategy == "no" or args.metric_for_best_model is None):
        raise MetaPeftError(
            "save_strategy=best saves a checkpoint where an evaluation is the best so far: set eval_strategy, and"
            " metric_for_best_model, such as loss."
        )


def check_best_metric(args: MetaLoraConfig, objective: str) -> None:
    """Raise if what the best checkpoint is chosen by is nothing that an evaluation measures."""
    best, metric = args.metric_for_best_model, args.metric or default_metric(objective)
    measured = (*LOSSES, metric)
    if args.eval_strategy != "no" and best is not None and best.removeprefix("eval_") not in measured:
        raise MetaPeftError(
            f"metric_for_best_model={best} is not measured: an evaluation gives {', '.join(measured)}. Name one of these,"
            f" or, if {best} is a metric, set it as metric too."
        )


def _check_can_be_made(make: Callable[[], Any], args: MetaLoraConfig, option: str, more: str) -> None:
    try:
        make()
    except Exception as error:  # optimizers of other libraries refuse options with errors of many kinds
        raise MetaPeftError(
            f"{option}={_name(getattr(args, option))} with {more}={getattr(args, more)} cannot be made:"
            f" {' '.join(str(error).split()).rstrip('.')}. Correct {more}, or choose another {option}."
        ) from error


def _name(option: Any) -> str:
    return str(getattr(option, "value", option))
