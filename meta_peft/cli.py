"""``meta-peft train | adapt | evaluate | inspect | tasks``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meta_peft.allocator import keep_freed_memory
from meta_peft.errors import MetaPeftError, did_you_mean

EXAMPLES = """examples:
  meta-peft train --config recipes/configs/locale_formatting.yaml
  meta-peft adapt --adapter outputs/meta_lora --support rows.jsonl --output new
  meta-peft evaluate --adapter outputs/meta_lora --tasks held_out.jsonl
  meta-peft inspect --adapter outputs/meta_lora
  meta-peft tasks --config recipes/configs/locale_formatting.yaml

exit codes: 0 done, 2 something given cannot be used (the message says what)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("meta_peft").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses an optional package at every start
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers by the old name
    if words[:1] != ["train"]:
        keep_freed_memory()
    try:
        return _main(words)
    except (MetaPeftError, OSError) as error:  # what was given, or a file that cannot be read or written
        print(f"meta-peft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _main(words: list[str]) -> int:
    if words[:1] == ["train"]:
        return train(words[1:])
    if words[:1] == ["inspect"] and "--estimate" in words:
        return estimate_command(words[1:])
    if words[:1] == ["tasks"]:
        return tasks_command(words[1:])
    parser, commands = command_parsers()
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise MetaPeftError(f"There is no command {words[0]!r}.{did_you_mean(words[0], commands)}")
    options = parser.parse_args(words)
    return {"adapt": adapt_command, "evaluate": evaluate_command, "inspect": inspect_command}[options.command](options)


def command_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and that of each command; `train` has a parser of its own."""
    parser = argparse.ArgumentParser(
        prog="meta-peft",
        description="Meta-learn LoRA adapters that adapt to a new task in a few gradient steps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,adapt,evaluate,inspect,tasks}")
    commands.add_parser("train", help="meta-train an adapter; --config FILE and --key value", add_help=False)
    adapt = commands.add_parser("adapt", help="adapt to one task, or to each task of a file", allow_abbrev=False)
    _model_options(adapt)
    adapt.add_argument("--support", required=True, metavar="FILE", help="examples; with --task-column, of many tasks")
    adapt.add_argument("--output", required=True, metavar="DIR", help="where the adapted PEFT adapter goes")
    adapt.add_argument("--task-column", help="adapt to each task this column names, into one folder each")
    adapt.add_argument("--steps", type=int, help="gradient steps (as in meta-training by default)")
    evaluate = commands.add_parser("evaluate", help="query loss and a metric on held-out tasks", allow_abbrev=False)
    _model_options(evaluate)
    evaluate.add_argument("--tasks", required=True, metavar="FILE", help="rows with a column that names their task")
    evaluate.add_argument("--task-column", default="task", help="that column (default: task)")
    evaluate.add_argument("--shots", type=int, help="support rows of a task (as in meta-training by default)")
    evaluate.add_argument("--steps", type=int, nargs="+", default=[0, 1, 3, 10], help="numbers of adaptation steps")
    evaluate.add_argument(
        "--metric", help="what is reported beside the loss (default: what suits the model, see metric)"
    )
    evaluate.add_argument("--max-new-tokens", type=int, help="where a generated answer is cut (see max_new_tokens)")
    evaluate.add_argument("--choice-score", default="sum", help="how choices are ranked: sum or mean (default: sum)")
    evaluate.add_argument("--tasks-per-forward", type=int, default=8, help="tasks evaluated at once (default: 8)")
    evaluate.add_argument("--output", metavar="DIR", help="also write results.json, results.md and results.png here")
    inspect = commands.add_parser(
        "inspect", help="an adapter's contents; --estimate: a run's memory", allow_abbrev=False
    )
    inspect.add_argument("--adapter", required=True, metavar="DIR_OR_ID", help="a folder or a hub id")
    commands.add_parser("tasks", help="which training tasks help or hurt; --config FILE", add_help=False)

    def fail(message: str) -> None:
        raise MetaPeftError(f"{message}; meta-peft --help shows what there is.")

    for each in (parser, adapt, evaluate, inspect):
        each.error = fail  # type: ignore[method-assign, assignment]  # argparse would exit with its usage
    return parser, dict(commands.choices)


def train(words: list[str]) -> int:
    """The main job, by config file and options."""
    from meta_peft.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config_file import parse
    from meta_peft.main_job import run
    from meta_peft.processes import group
    from meta_peft.sharding.asked import launched_to_shard

    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments)
    if not launched_to_shard():  # gathered weights that stay in the heap would be more than a whole base
        keep_freed_memory()
    try:
        run(*parse(groups, words, prog="meta-peft train", about="Meta-train a LoRA adapter and compare it."))
    finally:
        group.leave()
    return 0


def estimate_command(words: list[str]) -> int:
    """Where the memory of a run goes: options of `train`, and what an estimate has to know besides."""
    from meta_peft.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config_file import parse
    from meta_peft.estimate import EstimateArguments
    from meta_peft.estimate_report import account

    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments, EstimateArguments)
    about = "Estimate the memory of a training run."
    model_args, _, args, _, given = parse(groups, words, prog="meta-peft inspect --estimate", about=about)
    print(account(model_args, args, given))
    return 0


def tasks_command(words: list[str]) -> int:
    """Which tasks of a run help and which hurt: options of `train`, and what the report has to know besides."""
    from meta_peft.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config_file import parse
    from meta_peft.task_report import TaskReportArguments, run

    about = "Report which training tasks help and which hurt. Takes every option of train, and these."
    if {"-h", "--help"} & set(words):  # a page of its own, without the options of train
        parse((TaskReportArguments,), ["--help"], prog="meta-peft tasks", about=about)
    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments, TaskReportArguments)
    model_args, task_args, args, _, given = parse(groups, words, prog="meta-peft tasks", about=about)
    run(model_args, task_args, args, given)
    return 0


def adapt_command(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from meta_peft.adaptation import adapt_many
    from meta_peft.tasks import TaskSet
    from meta_peft.tasks.sources import read_rows

    if options.task_column is None:
        tasks: dict[str, Any] = {"task": read_rows(options.support)}
        folders = {"task": Path(options.output)}
    else:
        named = TaskSet.of(options.support, options.task_column)
        tasks = {name: named.rows(name) for name in named.names}
        folders = {name: Path(options.output) / _folder_name(name) for name in tasks}
        if len({str(folder).casefold() for folder in folders.values()}) < len(folders):
            raise MetaPeftError("Two task names give the same folder name: rename one of them.")
    model = _load(options)
    with tqdm(total=len(tasks), desc="adapting", unit="task", disable=None) as bar:
        adapted = adapt_many(model, tasks, steps=options.steps, progress=bar.update)
    for name, result in adapted.items():
        result.save(folders[name])
        print(json.dumps({"task": name, "folder": str(folders[name]), **result.metrics}, ensure_ascii=False))
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
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

    for option, values, least in (
        ("--shots", [] if options.shots is None else [options.shots], 1),
        ("--steps", options.steps, 0),
        ("--tasks-per-forward", [options.tasks_per_forward], 1),
        ("--max-new-tokens", [] if options.max_new_tokens is None else [options.max_new_tokens], 1),
    ):
        if any(value < least for value in values):
            raise MetaPeftError(f"{option} must be {least} or more; got {min(values)}.")
    one_of("--choice-score", options.choice_score, CHOICE_SCORES)
    if options.metric is not None:
        metric_named(options.metric)
    tasks = TaskSet.of(options.tasks, options.task_column)
    model = _load(options)
    learned = meta_learned(model)
    sidecar = learned.sidecar
    shots = sidecar.shots if options.shots is None else options.shots
    tasks.check_rows(shots, 1)
    encoded = tasks.encoded(learned.encoding)
    episodes = held_out(encoded, shots=shots)
    collate = learned.encoding.collator()
    loss_fn = AdapterLoss(model, second_order=False)
    scorer = scorer_for(
        options.metric,
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


def inspect_command(options: argparse.Namespace) -> int:
    from meta_peft.hub import fetch
    from meta_peft.sidecar import Sidecar

    sidecar = Sidecar.read(fetch(options.adapter))
    rates = sidecar.log_rates.exp()
    print(f"base model      {sidecar.base.name}  {sidecar.base.sizes}")
    print(f"algorithm       {sidecar.algorithm}, {sidecar.shots} shots, {sidecar.inner.steps} inner steps")
    print(f"inner optimizer {sidecar.inner.to_dict()['optimizer']}")
    if sidecar.objective != "causal_lm":
        print(f"objective       {sidecar.objective}  {' '.join(sidecar.facts.label_names)}".rstrip())
    print(f"LoRA matrices   {len(sidecar.names)}")
    print(
        f"inner rates     {rates.min():.2e} to {rates.max():.2e}, {'learned' if sidecar.inner.learn_rates else 'fixed'}"
    )
    print(f"prompt          {sidecar.prompt_format.prompt_template!r} {sidecar.prompt_format.completion_template!r}")
    fast = sidecar.inner.fast_names(sidecar.names)
    if len(fast) < len(sidecar.names):
        print(f"fast weights    {len(fast)} of them, those with {sidecar.inner.fast!r} in their names")
    if not sidecar.inner.rates_per_entry:
        for name, rate in zip(fast, rates[-1].tolist(), strict=True):
            print(f"  {rate:.2e}  {name}")
    return 0


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, metavar="DIR_OR_ID", help="a meta-learned adapter: folder or hub id"
    )
    parser.add_argument("--model-name-or-path", help="the base model (by default the one the adapter names)")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the base to 4 bits")
    parser.add_argument("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
    parser.add_argument("--dtype", default="float32", help="precision of the base: float32 or bfloat16")


def _load(options: argparse.Namespace) -> Any:
    from meta_peft.hub import load

    return load(
        options.model_name_or_path,
        options.adapter,
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        dtype=options.dtype,
    )


def _folder_name(task: str) -> str:
    """A task's name as the name of one folder, nothing outside it."""
    name = "".join(character if character.isalnum() or character in "-_." else "_" for character in task).strip(".")
    if len(name.encode()) > 200:
        raise MetaPeftError(f"The task name {name[:60]!r}... is too long for the name of a folder: shorten it.")
    return name or "_"


if __name__ == "__main__":
    sys.exit(main())
