"""The main job: meta-train on many tasks, adapt to held-out ones, compare with what one would do instead, save."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from meta_peft.adapters.card import CardResults
from meta_peft.base.base_config import objective_of
from meta_peft.base.new_adapter import new_model
from meta_peft.base.tokenizers import tokenizer_for
from meta_peft.comparison.about_run import about_run
from meta_peft.comparison.compare import CompareArguments, compare, multitask_starts
from meta_peft.comparison.equal_compute import check_schedule
from meta_peft.comparison.rate_edges import at_the_edge, edges_in_words
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.evaluation.report import PLOT, Report, check_plots, remove_report
from meta_peft.run_tasks.run_episodes import with_classes
from meta_peft.run_tasks.task_loading import run_tasks
from meta_peft.sharding import asked_for, check_sharding
from meta_peft.survival import training_state
from meta_peft.tasks import TaskSet
from meta_peft.tasks.labelling import of_classes
from meta_peft.training.trainer import MetaTrainer
from meta_peft.training.trainer_options import check_best_metric, check_evaluation, check_optimizer


def run(
    model_args: ModelArguments, task_args: TaskArguments, args: MetaLoraConfig, comparison: CompareArguments
) -> Report | None:
    """Train, save to `args.output_dir`, compare, and write table and plot there; those of an earlier run go."""
    _check_base(model_args, args)
    check_optimizer(args)
    tasks, leakage = run_tasks(task_args, args)
    check_evaluation(args, validation="validation" in tasks)
    check_best_metric(args, objective_of(model_args))
    compared = comparison.compare != "none" and {"validation", "test"} <= set(tasks)
    if compared:
        check_plots()
        if comparison.compare == "full":
            check_schedule(args)
    model_args = with_classes(model_args, tasks.values(), args.ways, args.label_words)
    tokenizer = tokenizer_for(model_args)
    trainer = MetaTrainer(
        new_model(model_args, args.seed),
        args=args,
        train_dataset=tasks["train"],
        eval_dataset=tasks.get("validation"),
        processing_class=tokenizer,
    )
    plain = trainer.start("plain LoRA")
    output_dir, began = Path(str(args.output_dir)), time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.monotonic() - began
    if not args.process_index:
        remove_report(output_dir)  # of an earlier run there: it would be pushed with this one's adapter
    trainer.save_model()
    if trainer.interrupted is not None:
        print(f"Stopped by a signal. {_how_to_go_on(output_dir, trainer.state.global_step)}")
        raise SystemExit(128 + trainer.interrupted)
    if not compared:
        if not args.process_index:
            print(f"The adapter is in {args.output_dir}.{_not_compared(comparison, tasks)}")
        return None

    learned = trainer.start("meta-learned LoRA")
    baselines = [[plain]]
    if comparison.compare == "full":  # trained by all processes together
        baselines.append(multitask_starts(trainer, tasks["train"], partial(new_model, model_args, args.seed)))
    if args.process_index and not asked_for():
        return None
    report = compare(trainer, baselines, learned, tasks, comparison)  # on a sharded base by all processes together
    if args.process_index:
        return None
    about = about_run(model_args, task_args, args, tasks)
    report = replace(report, run={**about, "training_seconds": round(seconds, 1), "leakage": leakage})
    found = report.curves[learned.name]
    trainer.record(
        rate_factors={k: f for k, f in zip(found.steps, found.factors, strict=True) if f is not None},
        results=CardResults(
            report.markdown(),
            [row for row in report.rows() if row["start"] == learned.name],
            report.metric.name,
            report.tasks,
            len(tasks["train"]),
            ()
            if task_args.dataset_name is None or Path(task_args.dataset_name).exists()
            else (task_args.dataset_name,),
            PLOT,
        ),
    )
    report.write(output_dir)  # first: the card shows the plot, and may be pushed with it
    trainer.save_model()
    examples = f"{args.shots} examples{of_classes(args.ways) or ' each'}"
    print(f"\nHeld-out tasks: {len(report.tasks)}, {examples}.\n\n{report.markdown()}\n")
    for name, curve in report.curves.items():
        for words in edges_in_words(name, at_the_edge(curve.steps, [curve.factors], comparison.rate_factors)):
            print(words)
    print(f"Adapter, table and plot are in {args.output_dir}.")
    return report


def _how_to_go_on(output_dir: Path, step: int) -> str:
    last = output_dir / f"checkpoint-{step}"
    if training_state.is_in(last):
        return f"To go on: {shlex.join(['--output_dir', str(output_dir), '--resume_from_checkpoint', str(last)])}"
    return f"There is no checkpoint of outer step {step} to go on from; the adapter as it was then is in {output_dir}."


def _not_compared(comparison: CompareArguments, tasks: dict[str, TaskSet]) -> str:
    missing = [split for split in ("validation", "test") if split not in tasks]
    if comparison.compare == "none" or len(missing) != 1:  # who gives neither asks for no table
        return ""
    return (
        " There is no table: rates are chosen on validation tasks and judged on test tasks, and there are no"
        f" {missing[0]} tasks."
    )


def _check_base(model_args: ModelArguments, args: MetaLoraConfig) -> None:
    """What cannot work where the base is to be kept is refused before it is loaded."""
    sharding = asked_for()
    back_end = sharding.back_end if sharding else "device_map" if model_args.device_map else None
    if back_end:
        check_sharding(back_end, model_args.quantisation, args.algorithm_object())
