"""Measure what is missing of a comparison, and write the report of what is there."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meta_peft.base.base_config import objective_of
from meta_peft.base.tokenizers import tokenizer_for
from meta_peft.base.weight_files import weights_digest
from meta_peft.comparison.about_run import about_run
from meta_peft.comparison.compare import CompareArguments, held_out_tasks
from meta_peft.comparison.equal_compute import check_schedule
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.report import check_plots
from meta_peft.frozen.cache import FrozenCache
from meta_peft.protocol.arguments import ProtocolArguments
from meta_peft.protocol.cells import MeasuredWith, all_found, cells_of, digest, path_of, trained_for
from meta_peft.protocol.measure import measured
from meta_peft.protocol.page import write_page
from meta_peft.protocol.setting import Setting
from meta_peft.protocol.summary import NothingToCompareError, Summary
from meta_peft.run_tasks.run_episodes import with_classes
from meta_peft.run_tasks.task_loading import run_tasks
from meta_peft.tasks import TaskSet
from meta_peft.tasks.labelling import Classes, episodes_of

logger = logging.getLogger("meta_peft")
FILES = ("train_tasks", "validation_tasks", "test_tasks")  # of what `about_run` tells of the tasks
NOT_OF_A_CELL = ("seed", "world_size", "memory")  # of what `about_run` tells
# Options of `MetaLoraConfig` that say how a run is done. That changes nothing of what comes out, but for how many outer
# steps are of equal compute, which `check_length` looks after.
HOW_IT_RUNS = (
    *("output_dir", "memory", "memory_budget_gb", "frozen_cache_gb", "tasks_per_forward", "per_device_eval_batch_size"),
    *("deterministic_reduction", "max_skipped_updates", "task_leakage", "dataset_num_proc", "logging_steps"),
)
OF_THE_TRAINER = (  # options of `TrainingArguments` that change it
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps"),
    *("warmup_steps", "lr_scheduler_kwargs"),
)


def run(
    model_args: ModelArguments,
    task_args: TaskArguments,
    args: MetaLoraConfig,
    comparison: CompareArguments,
    protocol: ProtocolArguments,
) -> Summary | None:
    """Compare starts on held-out tasks; cells and report are in `args.output_dir`.

    Returns:
        What the cells say together; None if they were measured, and make no comparison without those of other processes.

    Raises:
        MetaPeftError: there are no validation or test tasks, or too few tasks or rows for `task_counts` or `shots_curve`;
            the job has several processes; or cells in the folder were measured with other options, rows or weights of the
            base, or trained for another number of outer steps.
    """
    if args.world_size > 1:
        raise MetaPeftError(
            f"A comparison runs in one process, not in {args.world_size}: start one process for each of its seeds, with"
            " the same output_dir."
        )
    check_plots()
    check_schedule(args)
    tasks, leakage = run_tasks(task_args, args)
    labels, columns = args.labelling(), tasks["train"].task_columns
    tasks_are_classes = labels is not None and labels.tasks_are_classes(columns)
    starts = protocol.starts_of(objective_of(model_args), args.label_words, tasks_are_classes=tasks_are_classes)
    missing = [split for split in ("validation", "test") if split not in tasks]
    if missing:
        raise MetaPeftError(
            f"There are no {' and no '.join(missing)} tasks: rates are chosen on the one, judged on the other."
        )
    protocol.check_task_counts(len(tasks["train"]), args.ways if tasks_are_classes and args.ways else 1)
    if protocol.shots_curve:
        judged = held_out_tasks(tasks["test"], comparison.max_test_tasks, args.ways)
        _check_shots(episodes_of(judged, labels), max(protocol.shots_curve))
    model_args = with_classes(model_args, tasks.values(), args.ways, args.label_words)
    about = {**about_run(model_args, task_args, args, tasks), "leakage": leakage, "comparison": _compared(comparison)}
    folder = Path(str(args.output_dir))
    curve = tuple(sorted(set(protocol.shots_curve or ())))
    now = MeasuredWith(
        options=_options_of_a_cell(about, curve),
        inputs=_inputs_of_a_cell(args, tasks),
        base=weights_digest(model_args),
        earlier=(_options_of_a_cell(about, curve, files=True),),  # with the names of files in them
    )
    found = all_found(folder, now)  # what is there may be of others: known before anything is trained
    if protocol.measure:
        processor = tokenizer_for(model_args)
        frozen = FrozenCache(args.frozen_cache_gb * 1e9)
        setting = Setting(model_args, args, comparison, tasks, processor, curve, folder, frozen, trained_for(found))
        cells = list(cells_of(protocol, starts))
        for i, cell in enumerate(cells, 1):
            if path_of(cell, folder).is_file():
                continue
            logger.info("Cell %d of %d: %s", i, len(cells), cell.name)
            measured(cell, setting, now).write(folder)
        found = all_found(folder, now)  # other processes may have measured some
    if not found:
        raise MetaPeftError(f"There is nothing measured in {folder} yet: leave measure=false out.")
    trained_for(found)  # the same for all seeds
    try:
        summary = Summary.of(found, about)
    except NothingToCompareError as why:
        if not protocol.measure:
            raise
        logger.warning("All that was asked for is measured, and there is no report yet. %s", why)
        return None
    write_page(summary, folder)
    return summary


def _check_shots(judged: TaskSet | Classes, most: int) -> None:
    """Raise if a test task has too few rows for the longest of `shots_curve`, which is run when all training is done."""
    try:
        judged.check_rows(most, 1)
    except MetaPeftError as error:
        raise MetaPeftError(f"shots_curve goes up to {most}, for which test tasks are too small: {error}") from error


def _inputs_of_a_cell(args: MetaLoraConfig, tasks: dict[str, TaskSet]) -> str:
    """A digest of all options of the training but its seed, and of all rows."""
    names = sorted({*MetaLoraConfig.__annotations__, *OF_THE_TRAINER} - {*HOW_IT_RUNS})
    rows = {split: digest(*(found.rows(task) for task in found.names)) for split, found in tasks.items()}
    return digest({name: getattr(args, name) for name in names}, rows)


def _compared(comparison: CompareArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(comparison).items() if name != "compare"}


def _options_of_a_cell(about: dict[str, Any], curve: tuple[int, ...], *, files: bool = False) -> str:
    """A digest of all other options; rows are the same wherever their files are."""
    tasks = {name: value for name, value in about["tasks"].items() if files or name not in FILES}
    training = {name: value for name, value in about["training"].items() if name not in NOT_OF_A_CELL}
    return digest(about["model"], tasks, about["data"], training, about["comparison"], curve)
