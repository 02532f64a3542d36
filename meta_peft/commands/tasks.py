"""``meta-peft tasks``: which training tasks help and which hurt."""

from __future__ import annotations

from collections.abc import Sequence


def run(words: Sequence[str]) -> int:
    """Which tasks of a run help and which hurt: options of `train`, and what the report has to know besides."""
    from meta_peft.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config_file import parse
    from meta_peft.task_report import TaskReportArguments
    from meta_peft.task_report import run as report

    about = "Report which training tasks help and which hurt. Takes every option of train, and these."
    if {"-h", "--help"} & set(words):  # a page of its own, without the options of train
        parse((TaskReportArguments,), ["--help"], prog="meta-peft tasks", about=about)
    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments, TaskReportArguments)
    model_args, task_args, args, _, given = parse(groups, words, prog="meta-peft tasks", about=about)
    report(model_args, task_args, args, given)
    return 0
