"""How long rows may be for rotary embeddings that are the same for a row whatever stands beside it.

Two kinds of `transformers` are not, for rows longer than the base was trained on: `dynamic` keeps the frequencies of the
longest row it has met, and `longrope` takes others as soon as one row of a batch is long. A support row would then cost
something else when its graph is built again, and a task something else in the company of another.
"""

from __future__ import annotations

from typing import Any

from meta_peft.errors import MetaPeftError
from meta_peft.types import Rows


def check_rows(most: int | None, kind: str, rows: Rows, behind: int = 0) -> None:
    """`check_length` of rows that stand behind so many tokens of a prompt."""
    length = rows.labels_BL.shape[-1] if "input_ids" not in rows.inputs else rows.inputs["input_ids"].shape[-1]
    check_length(most, kind, length + behind)


def check_length(most: int | None, kind: str, length: int) -> None:
    """Raise if rows are so long that what one costs depends on others; `most` and `kind` are from `longest`."""
    if most is not None and length > most:
        raise MetaPeftError(
            f"Rows of {length} tokens are longer than the {most} that rotary embeddings of type {kind} leave alone: beyond"
            f" them the loss of a task depends on the others. Set max_length to {most} or less."
        )


def longest(config: Any) -> tuple[int | None, str]:
    """The most tokens, and the kind of embedding that limits them; None where nothing does."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_kind_of_layer = [part for part in given.values() if isinstance(part, dict)]
    for part in by_kind_of_layer or [given]:
        kind = part.get("rope_type", part.get("type"))
        if kind == "dynamic":
            return config.max_position_embeddings, kind
        if kind == "longrope":
            own = part.get("original_max_position_embeddings")
            return own or getattr(config, "original_max_position_embeddings", config.max_position_embeddings), kind
    return None, ""
