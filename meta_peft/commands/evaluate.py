"""``meta-peft evaluate``: one adapter on held-out tasks, or the whole comparison of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from meta_peft.commands.model_options import add_model_options, load_model
from meta_peft.errors import MetaPeftError


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--tasks", required=True, metavar="FILE", help="rows with a column that names their task")
    parser.add_argument("--task-column", nargs="+", help="that column, or several (as in meta-training by default)")
    parser.add_argument("--shots", type=int, help="support rows of a task (as in meta-training by default)")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 3, 10], help="numbers of adaptation steps")
    parser.add_argument("--metric", help="what is reported beside the loss (as in meta-training by default)")
    parser.add_argument("--max-new-tokens", type=int, help="where a generated answer is cut (see max_new_tokens)")
    parser.add_argument("--choice-score", default="sum", help="how choices are ranked: sum or mean (default: sum)")
    parser.add_argument("--tasks-per-forward", type=int, default=8, help="tasks evaluated at once (default: 8)")
    parser.add_argument("--output", metavar="DIR", help="also write results.json, results.md and results.png here")


def run(options: argparse.Namespace) -> int:
    """Query loss and a metric of one adapter, with the rates that were chosen for it."""
    from meta_peft.adapter_loss import AdapterLoss
    from meta_peft.checked import one_of
    from meta_peft.evaluate import Start, tuned_curve
    from meta_peft.hub import meta_learned
    from meta_peft.inner_optimizers.rule import RATES
    from meta_peft.metrics import metric_named
    from meta_peft.report import Report
    from meta_peft.scoring import CHOICE_SCORES, scorer_for
    from meta_peft.tasks import TaskSet
    from meta_peft.tasks.held_out import held_out
    from meta_peft.tasks.labelling import episodes_of

    _check_numbers(options)
    one_of("--choice-score", options.choice_score, CHOICE_SCORES)
    if options.metric is not None:
        metric_named(options.metric)
    if options.task_column is not None:  # what is wrong with the file is known before the model is loaded
        TaskSet.of(options.tasks, options.task_column)
    model = load_model(options)
    learned = meta_learned(model)
    sidecar = learned.sidecar
    judged, shots = sidecar.judged, sidecar.shots if options.shots is None else options.shots
    tasks = TaskSet.of(options.tasks, options.task_column or judged.task_column)
    episodes_of(tasks, judged.labelling).check_rows(shots, 1)
    episodes = held_out(tasks.encoded(learned.encoding), shots=shots, labels=judged.labelling)
    collate = learned.encoding.collator()
    loss_fn = AdapterLoss(model, second_order=False)
    scorer = scorer_for(
        options.metric or judged.metric,
        loss_fn,
        learned.tokenizer,
        max_new_tokens=options.max_new_tokens,
        choice_score=options.choice_score,
    )
    weights = {name: p.detach() for name, p in loss_fn.weights.parameters().items()}
    device = next(iter(weights.values())).device
    drawn = episodes.by_length()
    batches = [batch.to(device) for batch in collate.stacks(drawn, options.tasks_per_forward)]
    start = Start("meta-learned LoRA", weights, {RATES: sidecar.log_rates.to(device)}, sidecar.inner)
    factors = {step: sidecar.rate_factor(step) for step in options.steps}
    curves = {start.name: tuned_curve(loss_fn, start, batches, factors, scorer=scorer)}
    report = Report([episode.task for episode in drawn], curves, {"tasks": options.tasks, "shots": shots})
    print(f"Tasks: {len(tasks)}, {shots} examples and {episodes.query_size} questions each.\n\n{report.markdown()}")
    if options.output:
        report.write(Path(options.output))
    return 0


def compare(words: Sequence[str]) -> int:
    """The whole comparison: options of `train`, and what is compared (see `meta_peft.protocol`)."""
    from meta_peft.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config_file import parse
    from meta_peft.protocol import ProtocolArguments, run
    from meta_peft.protocol.verdict import verdict

    about = "Compare starts on held-out tasks. Takes every option of train, and these."
    if {"-h", "--help"} & set(words):  # a page of its own, without the options of train
        parse((ProtocolArguments,), ["--help"], prog="meta-peft evaluate --config FILE", about=about)
    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments, ProtocolArguments)
    model_args, task_args, args, comparison, protocol = parse(groups, words, prog="meta-peft evaluate", about=about)
    summary = run(model_args, task_args, args, comparison, protocol)
    print("\n".join(verdict(summary)))
    print(f"The report is {Path(str(args.output_dir)) / 'report.html'}.")
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    for option, values, least in (
        ("--shots", [] if options.shots is None else [options.shots], 1),
        ("--steps", options.steps, 0),
        ("--tasks-per-forward", [options.tasks_per_forward], 1),
        ("--max-new-tokens", [] if options.max_new_tokens is None else [options.max_new_tokens], 1),
    ):
        if any(value < least for value in values):
            raise MetaPeftError(f"{option} must be {least} or more; got {min(values)}.")
