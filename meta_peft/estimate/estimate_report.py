"""An estimate as text: where every gigabyte goes, and what other settings would take."""

from __future__ import annotations

import copy
from typing import Any

from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.estimate.estimate import CUDA_GB, Estimate, EstimateArguments, Line, estimate

OTHERS: dict[str, dict[str, Any]] = {
    "unrolled": {"algorithm": "maml", "memory": "unrolled", "gradient_checkpointing": False},
    "replay": {"algorithm": "maml", "memory": "replay", "gradient_checkpointing": False},
    "replay, gradient_checkpointing": {"algorithm": "maml", "memory": "replay", "gradient_checkpointing": True},
    "finite_differences": {"algorithm": "maml", "memory": "finite_differences", "gradient_checkpointing": False},
    "first order (fomaml)": {"algorithm": "fomaml", "gradient_checkpointing": False},
    "first order, gradient_checkpointing": {"algorithm": "fomaml", "gradient_checkpointing": True},
}


def account(model_args: ModelArguments, args: MetaLoraConfig, given: EstimateArguments) -> str:
    """The whole text. GB are 10^9 bytes."""
    found = estimate(model_args, args, given)
    memory = f", memory {args.memory}" if args.algorithm in ("maml", "imaml") else ""
    lines = [
        f"{model_args.model_name_or_path}: {args.algorithm}{memory}, {found.tasks} of {found.batch} tasks at once",
        "",
        *_table("all the time", found.resting),
        *_table("at the fullest moment of a meta-gradient", found.working),
        _row("in all", "", found.total / 1e9),
    ]
    if given.device_gb is not None:
        lines += [
            _row("CUDA", "an allowance for its context and workspaces, not measured", CUDA_GB),
            _verdict(found, given.device_gb),
        ]
    if given.alternatives:
        lines += ["", "other settings"]
        lines += [f"  {name:<38} {_other(model_args, args, given, changes)}" for name, changes in OTHERS.items()]
    return "\n".join(lines)


def _table(title: str, lines: list[Line]) -> list[str]:
    rows = [_row(f"  {line.what}", line.how, line.n_bytes / 1e9) for line in lines]
    return [_row(title, "", sum(line.n_bytes for line in lines) / 1e9), *rows]


def _row(what: str, how: str, gigabytes: float) -> str:
    return f"{what:<42} {how:<72} {gigabytes:8.2f} GB"


def _verdict(found: Estimate, device_gb: float) -> str:
    left = device_gb - CUDA_GB - found.total / 1e9
    word = "fits into" if left >= 0 else "does not fit into"
    return _row(f"{word} {device_gb:g} GB", "left over" if left >= 0 else "missing", abs(left))


def _other(model_args: ModelArguments, args: MetaLoraConfig, given: EstimateArguments, changes: dict[str, Any]) -> str:
    changed = copy.copy(args)
    for option, value in changes.items():
        setattr(changed, option, value)
    try:
        found = estimate(model_args, changed, given)
    except MetaPeftError as reason:
        return f"refused: {str(reason).split(':')[0]}"
    fits = "" if given.device_gb is None else "  fits" if found.total / 1e9 + CUDA_GB <= given.device_gb else "  no"
    return f"{found.total / 1e9:8.2f} GB, {found.tasks} tasks at once{fits}"
