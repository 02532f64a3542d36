"""``meta-peft tasks``: which training tasks help and which hurt."""

from __future__ import annotations

from collections.abc import Sequence

from meta_peft.commands.run_options import run_options, show_help

HELP = """usage: meta-peft tasks --config FILE [--key value ...]

Report which training tasks help and which hurt. Takes every option of
`meta-peft train`, and these:

  --report_dir DIR              for report.json and report.md (outputs/tasks)
  --adapter DIR                 look from this adapter or checkpoint of the run;
                                by default from the untrained start
  --group_pattern REGEX         tasks whose names give the same match are one
                                group; by default each task is one
  --episodes_per_task N         a gradient is the mean of so many (2)
  --leave_out_steps N           train so many outer steps with all groups and
                                without each one, which is slow; 0 does not (0)

examples:
  meta-peft tasks --config recipes/configs/locale_formatting.yaml
  meta-peft tasks --config mine.yaml --group_pattern '[^/]+$'"""


def run(words: Sequence[str]) -> int:
    """Which tasks of a run help and which hurt: options of `train`, and what the report has to know besides."""
    show_help(words, HELP)
    from meta_peft.comparison.task_report import TaskReportArguments
    from meta_peft.comparison.task_report import run as report

    model_args, task_args, args, _, given = run_options(words, TaskReportArguments, prog="meta-peft tasks")
    report(model_args, task_args, args, given)
    return 0
