"""The command-line options that the programs share."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

from workload import SHAPES, Workload

CHOICES = {
    "shapes": list(SHAPES),
    "base": ["fp32", "nf4", "int8"],
    "layers": ["all", "top_third"],
    "order": ["first", "second"],
}
Settings = dict[str, Any]
"""meta_peft's own options: ``memory`` and ``tasks_per_forward``."""


def parser_of(program: str) -> argparse.ArgumentParser:
    """A parser with what every program takes; `program` is its docstring."""
    parser = argparse.ArgumentParser(description=program, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write JSON")
    parser.add_argument("--rounds", type=int, default=None, help="how often everything is timed (5; 1 with --quick)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process (all cores)")
    parser.add_argument(
        "--malloc", choices=["keep", "default"], default="keep", help="whether glibc keeps freed memory"
    )
    parser.add_argument("--quick", action="store_true", help="a trial in seconds: every size tiny, one round")
    return parser


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Changes to the workloads of a program."""
    group = parser.add_argument_group("workload", "changes to what the program has by default")
    group.add_argument("--tiny", action="store_true", help="the same as --shapes tiny")
    for field in fields(Workload):
        kind = type(field.default)
        group.add_argument(f"--{field.name}", type=kind, default=None, choices=CHOICES.get(field.name))


def workload_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Workload` that the command line sets."""
    given = {field.name: getattr(options, field.name) for field in fields(Workload)}
    return ({"shapes": "tiny"} if options.tiny else {}) | {name: v for name, v in given.items() if v is not None}


def rounds(options: argparse.Namespace) -> int:
    if options.rounds is not None:
        return int(options.rounds)
    return 1 if options.quick else 5


def memory_mode(text: str) -> str | int:
    """A mode by name, or how many of the last inner steps keep their graphs."""
    return int(text) if text.isdigit() else text


def tasks_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def settings(memory: list[str | int | None] | None, tasks_per_forward: list[int | None] | None) -> dict[str, Settings]:
    """Every combination by the name of the contender; None is the library's default."""
    found = {}
    for mode, tasks in product(memory or [None], tasks_per_forward or [None]):
        words = ["ours"]
        words += [] if mode is None else [f"memory={mode}"]
        words += [f"tasks_per_forward={tasks or 'all'}"] if tasks_per_forward else []
        found[" ".join(words)] = {"memory": mode, "tasks_per_forward": tasks}
    return found
