"""``meta-peft inspect --estimate``: where the memory of a run would go."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from meta_peft.commands.run_options import run_options, show_help

HELP = """usage: meta-peft inspect --estimate --config FILE [--key value ...]

Where the memory of a training run would go; no weight is loaded. Takes every
option of `meta-peft train`, and these:

  --row_tokens N                tokens of a row (max_length)
  --labelled_tokens N           of these, tokens of the completion (8)
  --device_gb X                 memory of one GPU: what fits is said
  --alternatives false          leave other memory modes and first order out

example:
  meta-peft inspect --estimate --config mine.yaml --device_gb 24"""


def run(words: Sequence[str]) -> int:
    """Where the memory of a run goes: options of `train`, and what an estimate has to know besides."""
    show_help(words, HELP)
    from meta_peft.estimate.estimate import EstimateArguments
    from meta_peft.estimate.estimate_report import account

    model_args, _, args, _, given = run_options(words, EstimateArguments, prog="meta-peft inspect --estimate")
    logger = logging.getLogger("meta_peft")
    level = logger.level
    logger.setLevel(logging.WARNING)  # what is planned for each setting stands in the table
    try:
        print(account(model_args, args, given))
    finally:
        logger.setLevel(level)
    return 0
