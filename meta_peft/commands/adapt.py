"""``meta-peft adapt``: adapt to one task, or to each task of a file."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from meta_peft.commands.model_options import add_empty_rows, add_model_options, load_model, read_adapter
from meta_peft.errors import MetaPeftError
from meta_peft.utils.words import listed

ABOUT = "Adapt to one task, or to each task of a file."
USAGE = "--adapter DIR_OR_ID --support FILE --output DIR [options]"
EXAMPLES = """examples:
  meta-peft adapt --adapter outputs/mine --support rows.jsonl --output new
  meta-peft adapt --adapter outputs/mine --support customers.jsonl \\
      --task-column customer --hold-back 2 --output adapters

What is in DIR is not made again; DIR/failed.json: what failed (exit code 3)."""
SOME_FAILED = 3  # exit code


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--support", required=True, metavar="FILE", help="examples; with --task-column, of many tasks")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the adapted PEFT adapter goes")
    parser.add_argument("--task-column", nargs="+", metavar="C", help="columns that name tasks: adapt to each")
    parser.add_argument("--steps", type=int, metavar="N", help="gradient steps (as in meta-training)")
    held = "share or number of examples that tell when to stop (0)"
    parser.add_argument("--hold-back", type=_share_or_rows, default=0.0, metavar="X", help=held)
    add_empty_rows(parser)
    parser.add_argument("--tasks-per-forward", type=int, default=8, metavar="N", help="tasks adapted to at once (8)")


def run(options: argparse.Namespace) -> int:
    from meta_peft.adaptation.stacks import check_hold_back
    from meta_peft.tasks.row_index import LEAVE_OUT, LEFT_OUT_OR_NOT
    from meta_peft.utils.checked import at_least, one_of

    one_of("--empty-rows", options.empty_rows, LEFT_OUT_OR_NOT)
    if options.empty_rows == LEAVE_OUT and options.task_column is None:
        raise MetaPeftError("--empty-rows goes with --task-column: of one task, remove what is empty from its file.")
    at_least("--tasks-per-forward", options.tasks_per_forward, 1)
    check_hold_back(options.hold_back)
    return _one(options) if options.task_column is None else _each(options)


def _one(options: argparse.Namespace) -> int:
    from meta_peft.adaptation.adapt import adapt_many
    from meta_peft.tasks.sources import read_rows

    if Path(options.support).is_dir():
        raise MetaPeftError(
            f"--support must be a file with the examples of one task, and {options.support!r} is a folder: name one of its"
            " files; or adapt to each task of the folder with --task-column task."
        )
    rows = read_rows(options.support)
    folder, sidecar = read_adapter(options)
    columns, classes = sidecar.judged.task_column, sidecar.judged.labelling
    in_form = sidecar.row_form.of_rows(rows, columns[0])
    if classes is None or not classes.tasks_are_classes(columns):  # of which examples are of several
        _check_one_task(in_form, columns)
    model = load_model(options, folder)
    result = adapt_many(model, {"task": rows}, steps=options.steps, hold_back=options.hold_back)["task"]
    result.save(options.output)
    _say("task", options.output, result.metrics)
    return 0


def _check_one_task(rows: list[dict[str, Any]], task_column: tuple[str, ...]) -> None:
    """Rows of several tasks, by the column that named them in training, are no examples of one."""
    found = {tuple(str(row.get(column)) for column in task_column) for row in rows}
    if len(found) > 1 and all(column in row for row in rows for column in task_column):
        several = len(task_column) > 1
        columns = f"column{'s' if several else ''} {listed(map(repr, task_column))}"
        raise MetaPeftError(
            f"The rows are of {len(found)} tasks by their {columns}, which named"
            f" tasks in training: give --task-column {shlex.join(task_column)} to adapt to each, or remove"
            f" {'them' if several else 'it'} to take all rows for one task."
        )


def _each(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from meta_peft.adaptation.folder import FAILED, Made, adapt_folder
    from meta_peft.tasks import TaskSet

    folder, sidecar = read_adapter(options)
    how = {"empty_rows": options.empty_rows, "row_form": sidecar.row_form}
    tasks = TaskSet.of(options.support, options.task_column, **how)
    model = load_model(options, folder)
    with tqdm(total=len(tasks), desc="adapting", unit="task", disable=None) as bar:

        def done(made: Made) -> None:
            bar.update()
            _say(made.task, made.folder, {**made.metrics, **({"already": True} if made.already else {})})

        result = adapt_folder(
            model,
            tasks,
            options.output,
            task_column=options.task_column,
            steps=options.steps,
            hold_back=options.hold_back,
            tasks_per_forward=options.tasks_per_forward,
            done=done,
        )
    if not result.failed:
        return 0
    first, reason = next(iter(result.failed.items()))
    print(
        f"meta-peft: {len(result.failed)} of {len(tasks)} tasks failed, such as {first!r}: {reason} All are in"
        f" {Path(options.output) / FAILED}.",
        file=sys.stderr,
    )
    return SOME_FAILED


def _share_or_rows(word: str) -> float:
    """As `hold_back` of `adapt_many`: a whole number is one of rows."""
    try:
        return int(word) if word.isdecimal() else float(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a share of the examples, 0 or more and below 1, or a whole number of them; got {word!r}"
        ) from error


def _say(task: str, folder: Any, metrics: dict[str, Any]) -> None:
    print(json.dumps({"task": task, "folder": str(folder), **metrics}, ensure_ascii=False), flush=True)
