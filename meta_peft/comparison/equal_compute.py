"""Other algorithms in place of that of a run, for as many outer steps as cost what the run costs.

Counted in matrix products of a row with a layer. Layers below the lowest adapted one are run once a row, those below the
lowest fast weight once forward and once backward. What is kept of the former (`frozen_cache_gb`) is not run again: every
run that sees each row pays for it once, so that it makes no difference.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from transformers import SchedulerType
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from meta_peft.algorithms import MultiTask
from meta_peft.config import MetaLoraConfig
from meta_peft.errors import MetaPeftError
from meta_peft.outer_loop.schedule import AnyAlgorithm
from meta_peft.tasks import TaskSet
from meta_peft.types import Stack


def at_equal_compute(args: MetaLoraConfig, layers: Stack, tasks: TaskSet, **changes: Any) -> MetaLoraConfig:
    """A copy of `args` with some options changed, and with the outer steps that the same compute buys.

    Args:
        layers: how many layers the model has, and how many of them run how often (see `AdapterLoss.stack`).
        tasks: what is trained on.
        changes: options, such as ``algorithm="multitask"``. Steps of multi-task warm-up stay as they are.
    """
    own = unwatched(args)
    for option, value in changes.items():
        setattr(own, option, value)
    if not own.adapts_throughout:
        own.learn_head = None  # no inner step would move a head that the outer loop leaves as it is
    warmup = min(args.multitask_warmup_steps, args.max_steps)  # these cost what a step of multi-task training costs
    if layers.frozen < layers.all and _sees_kept_rows(args, tasks):
        layers = Stack(layers.all - layers.frozen, 0, layers.slow)
    ratio = compute_ratio(layers, args) / compute_ratio(layers, own)
    own.max_steps = warmup + round((args.max_steps - warmup) * ratio)
    return own


def unwatched(args: MetaLoraConfig) -> MetaLoraConfig:
    """A copy of the options of a run, for a training that is neither evaluated on its way nor saved."""
    own = copy.copy(args)
    own.eval_strategy, own.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    own.load_best_model_at_end = False  # which there is none of
    return own


def check_schedule(args: MetaLoraConfig) -> None:
    """Raise if the learning rate follows evaluations, of which `at_equal_compute` leaves none: it would never fall."""
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        raise MetaPeftError(
            "lr_scheduler_type=reduce_lr_on_plateau follows the evaluations of a training, and starts that are compared at"
            " equal compute have none: choose another schedule, or set compare to plain or none."
        )


def _sees_kept_rows(args: MetaLoraConfig, tasks: TaskSet) -> bool:
    """Whether rows come up again and are kept. That each can be, and has room, is taken for granted."""
    drawn = args.max_steps * args.tasks_in_a_step * (args.ways or 1) * (args.shots + args.query_size)
    return args.frozen_cache_gb > 0 and drawn >= tasks.found["rows"]


def compute_ratio(layers: Stack, args: MetaLoraConfig) -> float:
    """How many steps of multi-task training cost as much as one outer step of `args.algorithm`, on average."""
    rows, schedule = args.shots + args.query_size, args.schedule()

    def cost(algorithm: AnyAlgorithm) -> int:
        slow = layers.slow if algorithm.adapts and algorithm.inner.fast is not None else 0
        fast = layers.all - layers.frozen - slow
        in_passing = rows * fast if slow else 0  # the pass that finds what reaches the fast weights runs all layers
        return rows * (layers.frozen + 2 * slow) + in_passing + fast * algorithm.products(args.shots, args.query_size)

    proper = range(min(args.multitask_warmup_steps, args.max_steps - 1), args.max_steps)
    return float(np.mean([cost(schedule.at(step)) for step in proper])) / cost(MultiTask())
