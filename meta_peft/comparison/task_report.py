"""Which training tasks help on the validation tasks, and which hurt.

Tasks are looked at in groups: each task by itself, or those whose names give the same match of a pattern. g_a is the mean
meta-gradient of group a, v that of the validation tasks, at the adapter that training starts from or has come to.

- ``cosine(g_a, v)``: an outer step along the gradient of a group lowers the validation loss if it is positive.
- ``without``: to first order, what leaving the group out of an outer step does to the validation loss, per unit of
  outer learning rate, ``share_a / (1 - share_a) * (g_a - g) . v`` with g the mean over all tasks. Above zero, the loss
  would be higher without the group: it helps more than the others do. (TracIn, Pruthi et al. 2020, arXiv 2002.08484, for
  a group and one step.)
- ``cosine(g_a, g_b)``: whether two groups pull in one direction (gradient conflict, Yu et al. 2020, arXiv 2001.06782).
- Retraining, if asked for: N outer steps with all groups, and N without each one, from the same start with the same
  seed. The difference of the validation losses after adaptation is no estimate; it costs one run for each group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_peft.base.new_adapter import new_model
from meta_peft.base.tokenizers import tokenizer_for
from meta_peft.comparison.equal_compute import unwatched
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.evaluate import curve
from meta_peft.evaluation.intervals import interval
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.params import flatten
from meta_peft.run_tasks.run_episodes import with_classes
from meta_peft.run_tasks.task_loading import load_tasks, with_enough_rows
from meta_peft.tasks import EpisodeDataset, TaskSet
from meta_peft.tasks.leakage import Leakage, find_leakage
from meta_peft.training.trainer import MetaTrainer
from meta_peft.utils.atomic_files import write_file
from meta_peft.utils.checked import at_least
from meta_peft.utils.patterns import matches

NAMES = "report.json", "report.md"


@dataclass
class TaskReportArguments:
    """What the report on tasks looks at."""

    report_dir: str = field(default="outputs/tasks", metadata={"help": "Folder for report.json and report.md."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an adapter or checkpoint of this run to look from; by default the untrained start."
        },
    )
    group_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression; tasks whose names give the same match are one group. By default each task is"
            " one. For de/date_short, '[^/]+$' groups by what follows the slash."
        },
    )
    episodes_per_task: int = field(
        default=2, metadata={"help": "Episodes of each task that a gradient is the mean of."}
    )
    leave_out_steps: int = field(
        default=0,
        metadata={
            "help": "Also train, for so many outer steps, once with all groups and once without each of them, to see"
            " which ones help; slow. By default (0) nothing is trained."
        },
    )

    def __post_init__(self) -> None:
        at_least("episodes_per_task", self.episodes_per_task, 1)
        at_least("leave_out_steps", self.leave_out_steps, 0)


@dataclass(frozen=True)
class TaskReport:
    """What was found about G groups.

    Args:
        groups: their tasks, by name.
        cosines: of the groups' meta-gradients with one another, ``[G, G]``.
        with_validation: of each with that of the validation tasks, ``[G]``.
        without: the first-order effect of leaving the group out on the validation loss, ``[G]``.
        retrained: if asked for, what retraining without each group did to the validation loss: mean, and its 95 %
            interval over validation tasks, by group.
        leakage: tasks that are in two splits.
        run: what the run was.
    """

    groups: Mapping[str, Sequence[str]]
    cosines: np.ndarray
    with_validation: np.ndarray
    without: np.ndarray
    retrained: Mapping[str, tuple[float, float, float]]
    leakage: Leakage
    run: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """One for each group, those that help most first."""
        names = list(self.groups)
        rows = []
        for a, name in enumerate(names):
            others = [b for b in range(len(names)) if b != a]
            row: dict[str, Any] = {
                "group": name,
                "tasks": len(self.groups[name]),
                "cosine_with_validation": float(self.with_validation[a]),
                "without": float(self.without[a]),
            }
            if others:
                row["mean_cosine"] = float(self.cosines[a, others].mean())
                row["most_opposed"] = names[min(others, key=lambda b: self.cosines[a, b])]
            if name in self.retrained:
                row["retrained_without"], row["retrained_interval"] = (
                    self.retrained[name][0],
                    list(self.retrained[name][1:]),
                )
            rows.append(row)
        return sorted(rows, key=lambda row: -row["cosine_with_validation"])

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": dict(self.run),
            "rows": self.rows(),
            "groups": {name: list(tasks) for name, tasks in self.groups.items()},
            "cosines": self.cosines.tolist(),
            "leakage": self.leakage.to_dict(),
        }

    def markdown(self) -> str:
        """The table and what was found about leakage."""
        more = "| loss when retrained without (95 % interval) " if self.retrained else ""
        lines = [
            f"| group | tasks | cosine with validation | loss without, first order | mean cosine | most opposed {more}|",
            f"| --- | ---: | ---: | ---: | ---: | --- |{' ---: |' if self.retrained else ''}",
        ]
        for row in self.rows():
            cells = [row["group"].replace("|", "\\|"), str(row["tasks"])]
            cells += [f"{row['cosine_with_validation']:+.3f}", f"{row['without']:+.2e}"]
            cells += (
                [f"{row['mean_cosine']:+.3f}", row["most_opposed"].replace("|", "\\|")]
                if "mean_cosine" in row
                else ["", ""]
            )
            if self.retrained:
                low, high = row["retrained_interval"]
                cells.append(f"{row['retrained_without']:+.4f} ({low:+.4f} to {high:+.4f})")
            lines.append(f"| {' | '.join(cells)} |")
        said = str(self.leakage) if self.leakage.tasks else "No tasks of different splits are nearly the same."
        return "\n".join([*lines, "", said])

    def write(self, folder: Path) -> list[Path]:
        """Write ``report.json`` and ``report.md``; each is whole, or what it was before."""
        texts = json.dumps(self.to_dict(), indent=1, ensure_ascii=False), self.markdown()
        return [write_file(folder / name, f"{text}\n") for name, text in zip(NAMES, texts, strict=True)]


def run(
    model_args: ModelArguments, task_args: TaskArguments, args: MetaLoraConfig, arguments: TaskReportArguments
) -> TaskReport:
    """The report on the tasks of a run, written to `report_dir` and printed."""
    tasks = load_tasks(task_args, args.task_column)
    if "validation" not in tasks:
        raise MetaPeftError("The report compares training tasks with validation tasks: give validation_tasks.")
    tasks = with_enough_rows(tasks, task_args, args)
    model_args = with_classes(model_args, tasks.values(), args.ways, args.label_words)
    args = unwatched(args)
    trainer = MetaTrainer(
        new_model(model_args, args.seed),
        args=args,
        train_dataset=tasks["train"],
        processing_class=tokenizer_for(model_args),
    )
    report = task_report(trainer, tasks["train"], tasks["validation"], arguments)
    report.write(Path(arguments.report_dir))
    print(f"{report.markdown()}\n\nTable and JSON are in {arguments.report_dir}.")
    return report


def task_report(
    trainer: MetaTrainer, train: TaskSet, validation: TaskSet, arguments: TaskReportArguments
) -> TaskReport:
    """Look at the training tasks from where `trainer` is. It is left where it was.

    Args:
        trainer: made with these training tasks; its model, algorithm and options count.
        train, validation: tasks as text, not encoded.
        arguments: what to look at.
    """
    groups = grouped(train.names, arguments.group_pattern)
    if arguments.adapter is not None:
        trainer.adapter_record.restore(Path(arguments.adapter))
    gradients = group_gradients(trainer, train, groups, arguments.episodes_per_task)
    all_of_them = {"validation": validation.names}
    (of_validation,) = group_gradients(trainer, validation, all_of_them, arguments.episodes_per_task)
    sizes = torch.tensor([len(tasks) for tasks in groups.values()], dtype=torch.float64)
    retrained = {}
    if arguments.leave_out_steps:
        retrained = leave_one_group_out(trainer, train, validation, groups, arguments.leave_out_steps)
    return TaskReport(
        groups,
        cosines(gradients, gradients).numpy(),
        cosines(gradients, of_validation[None])[:, 0].numpy(),
        without(gradients, of_validation, sizes).numpy(),
        retrained,
        find_leakage({"train": train, "validation": validation}),
        {"adapter": arguments.adapter, "tasks": len(train), "validation_tasks": len(validation)},
    )


def grouped(names: Sequence[str], pattern: str | None) -> dict[str, list[str]]:
    """Tasks by group, in the order of their first tasks. Names that the pattern does not match are groups of their own."""
    if pattern is None:
        return {name: [name] for name in names}
    matches("group_pattern", pattern, tuple(names))  # raises if it is no pattern, or takes too long on these names
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.search(pattern, name)
        groups.setdefault(match[0] if match and match[0] else name, []).append(name)
    return groups


def group_gradients(trainer: MetaTrainer, tasks: TaskSet, groups: Mapping[str, Sequence[str]], episodes: int) -> Tensor:
    """The mean meta-gradient of the adapter over the tasks of each group, some episodes each, ``[G, P]`` in float64.

    Of the weights that training moves.
    """
    args = trainer.args
    drawn = EpisodeDataset(
        tasks.encoded(trainer.encoding),
        shots=args.shots,
        query_size=args.query_size,
        seed=args.seed,
        length=episodes * len(tasks),
        shuffle=False,
        labels=args.labelling(),
    )
    group_of = {task: a for a, its_tasks in enumerate(groups.values()) for task in its_tasks}
    counts = [episodes * len(its_tasks) for its_tasks in groups.values()]
    found: list[Tensor | None] = [None] * len(groups)
    for i in range(len(drawn)):
        batch = trainer.data_collator([drawn[i]]).to(args.device)
        gradient = meta_gradient(
            trainer.loss_fn, batch, trainer.algorithm, trainer.rates, tasks_per_forward=trainer.memory_plan
        )
        a = group_of[batch.tasks[0]]
        own = flatten(gradient.without(trainer.fixed).grads.adapter).detach().cpu().double() / counts[a]
        before = found[a]
        found[a] = own if before is None else before.add_(own)
    return torch.stack([total for total in found if total is not None])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each row of ``[n, P]`` with each of ``[m, P]``; 0 where one is all zeros."""
    of_a, of_b = (values / values.norm(dim=1, keepdim=True).clamp_min(1e-300) for values in (a, b))
    return of_a @ of_b.T


def without(gradients: Tensor, of_validation: Tensor, sizes: Tensor) -> Tensor:
    """The first-order effect of leaving each group out, ``[G]``, of groups of `sizes` tasks each; 0 for the only one."""
    share = sizes / sizes.sum()
    mean = share @ gradients
    rest = torch.where(share < 1, share / (1 - share), torch.zeros_like(share))
    return rest * ((gradients - mean) @ of_validation)


def leave_one_group_out(
    trainer: MetaTrainer, train: TaskSet, validation: TaskSet, groups: Mapping[str, Sequence[str]], steps: int
) -> dict[str, tuple[float, float, float]]:
    """By group, how much higher the validation loss after adaptation is when training went without it.

    Mean and 95 % interval of the differences of validation tasks, which are adapted on the same episodes. All runs start
    where `trainer` is.
    """
    if len(groups) < 2:
        raise MetaPeftError("There is one group alone, so none can be left out: choose another group_pattern.")
    start = {name: p.detach().clone() for name, p in trainer.loss_fn.weights.parameters().items()}
    rates = trainer.rates.log_rates.detach().clone()

    def losses(names: Sequence[str]) -> np.ndarray:
        trainer.loss_fn.weights.load_(start)
        run = MetaTrainer(
            trainer.loss_fn.model,
            args=_for_some_steps(trainer.args, steps),
            train_dataset=train.select(names),
            processing_class=trainer.processing_class,
            encoding=trainer.encoding,  # which would number the classes of fewer tasks otherwise
        )
        with torch.no_grad():
            run.rates.log_rates.copy_(rates)
        run.train_whole()
        batches = run.batches(run.evaluation_episodes(validation).by_length())
        return curve(run.scorer.loss_fn, run.start(), batches, (run.args.inner_steps,)).loss[:, 0]

    try:
        of_all = losses(train.names)
        found = {}
        for name, tasks in groups.items():
            difference = losses([task for task in train.names if task not in set(tasks)]) - of_all
            found[name] = (float(difference.mean()), *interval(difference))
    finally:
        trainer.loss_fn.weights.load_(start)
    return found


def _for_some_steps(args: MetaLoraConfig, steps: int) -> MetaLoraConfig:
    own = unwatched(args)
    own.max_steps = steps
    own.resume_from_checkpoint = None
    return own
