"""``meta-peft evaluate``: one adapter on held-out tasks, or the whole comparison of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from meta_peft.commands.model_options import add_empty_rows, add_model_options, load_model, read_adapter
from meta_peft.commands.run_options import run_options, show_help
from meta_peft.errors import MetaPeftError

ABOUT = "Query loss and a metric of an adapter on held-out tasks."
USAGE = "--adapter DIR_OR_ID --tasks FILE [options]"
EXAMPLES = """example: meta-peft evaluate --adapter outputs/mine --tasks held_out.jsonl
which start is best: meta-peft evaluate --config mine.yaml    (has a --help)"""
COMPARE_HELP = """usage: meta-peft evaluate --config FILE [--key value ...]

Which start is best for these tasks, at equal compute: train each, adapt it to
held-out tasks, write a report. Takes every option of `meta-peft train`, and:

  --starts NAME [NAME ...]      of peft_defaults, plain, multitask, classifier,
                                task_heads, reptile, fomaml, imaml, in_context
                                and meta (what the other options say); by
                                default all that there can be
  --seeds N [N ...]             each start is trained once for each (0 1 2)
  --shots_curve N [N ...]       also compare with so many support rows
  --task_counts N [N ...]       also train on so many of the training tasks
  --measure false               only write the report of what is there

What is in output_dir already is not measured again.

example:
  meta-peft evaluate --config mine.yaml --starts multitask meta --seeds 0 1"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--tasks", required=True, metavar="FILE", help="rows with a column that names their task")
    parser.add_argument("--task-column", nargs="+", metavar="C", help="that column, or several (as in meta-training)")
    parser.add_argument("--shots", type=int, metavar="N", help="support rows of a task (as in meta-training)")
    parser.add_argument("--query-size", type=int, default=64, metavar="N", help="query rows of a task at most (64)")
    steps = {"type": int, "nargs": "+", "default": [0, 1, 3, 10], "metavar": "N"}
    parser.add_argument("--steps", **steps, help="adaptation steps (0 1 3 10)")  # type: ignore[arg-type]
    parser.add_argument("--metric", metavar="NAME", help="beside the loss (as in meta-training)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="where a generated answer is cut")
    parser.add_argument("--choice-score", default="sum", metavar="HOW", help="choices rank by sum or mean (sum)")
    parser.add_argument("--tasks-per-forward", type=int, default=8, metavar="N", help="tasks evaluated at once (8)")
    add_empty_rows(parser)
    parser.add_argument(
        "--small-tasks", default="error", metavar="HOW", help="with too few rows: error or leave_out (error)"
    )
    parser.add_argument("--output", metavar="DIR", help="also write table and plot here")


def run(options: argparse.Namespace) -> int:
    """Query loss and a metric of one adapter, with the rates that were chosen for it."""
    from meta_peft.adapters.hub import meta_learned
    from meta_peft.evaluation.evaluate import Start, tuned_curve
    from meta_peft.evaluation.metrics import metric_named
    from meta_peft.evaluation.report import Report
    from meta_peft.evaluation.scoring import CHOICE_SCORES, scorer_for
    from meta_peft.functional.adapter_loss import AdapterLoss
    from meta_peft.inner_optimizers.rule import RATES
    from meta_peft.tasks import TaskSet
    from meta_peft.tasks.held_out import held_out
    from meta_peft.tasks.labelling import large_enough, of_classes
    from meta_peft.tasks.row_index import LEFT_OUT_OR_NOT
    from meta_peft.utils.checked import one_of

    _check_numbers(options)
    for option in ("empty_rows", "small_tasks"):
        one_of(f"--{option}".replace("_", "-"), getattr(options, option), LEFT_OUT_OR_NOT)
    one_of("--choice-score", options.choice_score, CHOICE_SCORES)
    if options.metric is not None:
        metric_named(options.metric)
    # What is wrong with the file is known before the model is loaded.
    folder, sidecar = read_adapter(options)
    judged, shots = sidecar.judged, sidecar.shots if options.shots is None else options.shots
    how = {"empty_rows": options.empty_rows, "row_form": sidecar.row_form}
    tasks = TaskSet.of(options.tasks, options.task_column or judged.task_column, **how)
    tasks = large_enough(tasks, judged.labelling, shots, 1, options.small_tasks)
    model = load_model(options, folder)
    learned = meta_learned(model)
    sizes = {"shots": shots, "query_size": options.query_size, "seed": judged.seed}
    episodes = held_out(tasks.encoded(learned.encoding), **sizes, labels=judged.labelling)
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
    report = Report(
        [episode.task for episode in drawn],
        curves,
        {"tasks": options.tasks, **sizes, "query_size": episodes.query_size},
    )
    rows = " each" if judged.labelling is None else of_classes(judged.labelling.ways)
    print(f"Tasks: {len(tasks)}, {shots} examples and {episodes.query_size} questions{rows}.\n\n{report.markdown()}")
    if options.output:
        report.write(Path(options.output))
    return 0


def compare(words: Sequence[str]) -> int:
    """The whole comparison: options of `train`, and what is compared (see `meta_peft.protocol`)."""
    show_help(words, COMPARE_HELP)
    if of_one := sorted({"--adapter", "--tasks"} & {word.partition("=")[0] for word in words}):
        raise MetaPeftError(
            f"evaluate takes either --config, to compare starts, or --adapter with --tasks, to judge one adapter: leave out"
            f" --config, or {' and '.join(of_one)}."
        )
    from meta_peft.protocol import ProtocolArguments, run
    from meta_peft.protocol.verdict import verdict

    given = run_options(words, ProtocolArguments, prog="meta-peft evaluate")
    summary = run(*given)
    if summary is None:
        return 0
    print("\n".join(verdict(summary)))
    print(f"The report is {Path(str(given[2].output_dir)) / 'report.html'}.")
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    for option, values, least in (
        ("--shots", [] if options.shots is None else [options.shots], 1),
        ("--query-size", [options.query_size], 1),
        ("--steps", options.steps, 0),
        ("--tasks-per-forward", [options.tasks_per_forward], 1),
        ("--max-new-tokens", [] if options.max_new_tokens is None else [options.max_new_tokens], 1),
    ):
        if any(value < least for value in values):
            raise MetaPeftError(f"{option} must be {least} or more; got {min(values)}.")
