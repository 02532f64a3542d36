"""The options of commands that take those of a training run, from a config file and the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def show_help(words: Sequence[str], page: str) -> None:
    """Print one screen and exit, if that is asked for; before anything heavy is imported."""
    if {"-h", "--help"} & set(words):
        print(page)
        sys.exit(0)


def run_options(words: Sequence[str], *own: type, prog: str) -> tuple[Any, ...]:
    """The four groups of a run's options, and one object of each class in `own`; ``--help_all`` lists every option."""
    from meta_peft.comparison.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config.config_file import parse

    every = {"--help_all", "--help-all"} & set(words)
    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments, *own)
    return parse(groups, ["--help"] if every else words, prog=prog)
