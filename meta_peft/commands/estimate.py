"""``meta-peft inspect --estimate``: where the memory of a run would go."""

from __future__ import annotations

from collections.abc import Sequence


def run(words: Sequence[str]) -> int:
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
