"""What a meta-learned adapter is compared with on held-out tasks, each start by the same protocol.

Plain LoRA is what one has without any training on other tasks; multi-task LoRA is what one gets from the same tasks
without an inner loop, and the one that is hard to beat; in-context examples need no training at all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from peft import PeftModel
from tqdm import tqdm

from meta_peft.comparison.early_stops import train_with_stops
from meta_peft.comparison.equal_compute import at_equal_compute
from meta_peft.config import MetaLoraConfig
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.evaluate import Curve, Start, joined, losses_by_factor, tuned_curve
from meta_peft.evaluation.in_context import in_context_scores
from meta_peft.evaluation.report import Report
from meta_peft.functional.row_length import RowsTooLongError
from meta_peft.tasks import TaskSet
from meta_peft.training.trainer import MetaTrainer
from meta_peft.types import Episode, EpisodeBatch
from meta_peft.utils.checked import at_least, is_number, one_of

logger = logging.getLogger("meta_peft")

# How LoRA is tuned without this library: Adam on all weights, from the rate of PEFT's quick tour.
PEFT_RULE: dict[str, Any] = {
    "inner_optimizer": "adam",
    "inner_lr": 1e-3,
    "inner_weight_decay": 0.0,
    "fast_weights": None,
}


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
    max_validation_tasks: int = field(
        default=12, metadata={"help": "Most validation tasks to choose rates on; of more, some that are drawn once."}
    )
    max_test_tasks: int = field(
        default=48, metadata={"help": "Most held-out tasks to measure; of more, some that are drawn once."}
    )

    def __post_init__(self) -> None:
        one_of("compare", self.compare, ("none", "plain", "full"))
        if not self.adaptation_steps or min(self.adaptation_steps) < 0:
            raise MetaPeftError(f"adaptation_steps must be numbers of 0 or more; got {self.adaptation_steps}.")
        if not self.rate_factors or not all(is_number(factor) and factor > 0 for factor in self.rate_factors):
            raise MetaPeftError(f"rate_factors must be positive numbers; got {self.rate_factors}.")
        for option in ("max_validation_tasks", "max_test_tasks"):
            at_least(option, getattr(self, option), 1)


def compare(
    trainer: MetaTrainer,
    baselines: list[list[Start]],
    learned: Start,
    tasks: dict[str, TaskSet],
    arguments: CompareArguments,
) -> Report:
    """Curves of all starts on held-out tasks, their rates chosen on validation tasks; with in-context examples if full
    and the model is causal.

    Args:
        trainer: whose model the starts are adapters of.
        baselines: what was learned without an inner loop, which may also adapt by Adam on all weights, each at one or
            several points of its training. The first one must be the untrained adapter, which changes nothing: in-context
            examples use it.
        learned: the meta-learned one.
        tasks: with the splits ``validation`` and ``test``.
        arguments: how much is compared.
    """
    validation = trainer.batches(held_out_episodes(trainer, tasks["validation"], arguments.max_validation_tasks))
    episodes = held_out_episodes(trainer, tasks["test"], arguments.max_test_tasks)
    test = trainer.batches(episodes)
    steps = sorted(set(arguments.adaptation_steps))
    starts = [*(by_all_rules(trainer, stops) for stops in baselines), [learned]]
    factors = arguments.rate_factors
    curves = {of_one[0].name: start_curve(trainer, of_one, validation, test, steps, factors) for of_one in starts}
    in_context = None
    if arguments.compare == "full" and trainer.scorer.loss_fn.causal:  # others read no other rows' answers
        plain, collate = baselines[0][0].adapter, trainer.data_collator
        try:
            found = in_context_scores(trainer.scorer, plain, episodes, collate, trainer.processing_class)
            in_context = found.loss, found.score
        except RowsTooLongError as error:  # all the rest is measured by now
            logger.warning("In-context examples are left out. %s", error)
    return Report([episode.task for episode in episodes], curves, {}, in_context)


def multitask_starts(of: MetaTrainer, tasks: TaskSet, new_model: Callable[[], PeftModel]) -> list[Start]:
    """The hard baseline: one LoRA for all tasks, from the same episodes and more, for the same compute or a part of it."""
    own = at_equal_compute(of.args, of.loss_fn.stack(of.args.inner_rule()), tasks, algorithm="multitask")
    trainer = MetaTrainer(
        new_model(),
        args=own,
        train_dataset=tasks,
        processing_class=of.processing_class,
        encoding=of.encoding,  # so that classes have the same numbers
    )
    trainer.use_frozen_cache(of.frozen_cache)
    return train_with_stops(trainer, "multi-task LoRA")


def some_tasks(tasks: TaskSet, n: int, seed: int = 0) -> TaskSet:
    """At most n tasks, drawn without regard to their order."""
    names = tasks.names
    chosen = np.random.default_rng(seed).permutation(len(names))[:n]
    return tasks.select(names[i] for i in sorted(chosen))


def with_peft_rule(args: MetaLoraConfig) -> MetaLoraConfig:
    """A copy of the options of a run, adapting by `PEFT_RULE`."""
    args = copy.copy(args)
    for option, value in PEFT_RULE.items():
        setattr(args, option, value)
    return args


def by_all_rules(trainer: MetaTrainer, stops: list[Start]) -> list[Start]:
    """A start by the run's own rule, and as users adapt LoRA: by Adam on all weights (`PEFT_RULE`), if the run's own rule,
    which is that of what is meta-learned, is another.

    Args:
        stops: the start at one or several points of its training.
    """
    own = trainer.args
    if own.inner_optimizer == PEFT_RULE["inner_optimizer"] and own.fast_weights is None:
        return stops
    rule = replace(with_peft_rule(own).inner_rule(), learn_rates=False)

    def by_adam(stop: Start) -> Start:
        how = ", ".join(filter(None, (stop.how, "Adam on all weights")))
        return replace(stop, rule=rule, hyper=rule.initial_rates(stop.adapter), how=how)

    return [*stops, *map(by_adam, stops)]


def held_out_tasks(tasks: TaskSet, n: int, ways: int | None) -> TaskSet:
    """At most n of the held-out tasks to measure on; but `ways`, of which an episode is where tasks are classes."""
    return some_tasks(tasks, max(n, ways or 0))


def held_out_episodes(trainer: MetaTrainer, tasks: TaskSet, n: int) -> list[Episode]:
    """The episodes of at most n held-out tasks, the same for every start."""
    return trainer.evaluation_episodes(held_out_tasks(tasks, n, trainer.args.ways)).by_length()


def start_curve(
    trainer: MetaTrainer,
    starts: list[Start],
    validation: list[EpisodeBatch],
    test: list[EpisodeBatch],
    steps: list[int],
    factors: list[float],
) -> Curve:
    """The curve of one start on the test tasks, its rate for each number of steps chosen on the validation tasks.

    `starts` are that one start by one or several rules and at one or several points of its training, of which the
    validation tasks choose as well, the first one where all do the same.
    """
    n_validation, n_test = (sum(batch.n_tasks for batch in batches) for batches in (validation, test))
    to_tune = n_validation * len(factors) * len(starts)
    with tqdm(total=to_tune + n_test, desc=starts[0].name, unit="task", dynamic_ncols=True) as bar:
        loss_fn, steps = trainer.scorer.loss_fn, sorted(steps)
        loss_VFS = np.stack(
            [losses_by_factor(loss_fn, s, validation, steps, factors, progress=bar.update) for s in starts]
        )
        best_S = loss_VFS.reshape(-1, len(steps)).argmin(0)
        which_S, factor_S = best_S // len(factors), [factors[i] for i in best_S % len(factors)]
        bar.total = to_tune + n_test * len(set(best_S))
        chosen = [
            {k: f for k, f, w in zip(steps, factor_S, which_S, strict=True) if w == i} for i in range(len(starts))
        ]
        found = joined(
            [
                tuned_curve(loss_fn, s, test, of_it, scorer=trainer.scorer, progress=bar.update)
                for s, of_it in zip(starts, chosen, strict=True)
                if of_it
            ]
        )
        return replace(found, along_training=_along_training(starts, loss_VFS))


def _along_training(starts: list[Start], loss_VFS: np.ndarray) -> dict[float, tuple[float, ...]]:
    """For each part of the training, by the rule and at the rate that do best there after each number of steps."""
    parts = np.array([start.part for start in starts])
    return {float(part): tuple(loss_VFS[parts == part].min((0, 1)).tolist()) for part in np.unique(parts)}
