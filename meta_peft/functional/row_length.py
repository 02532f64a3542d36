"""How long rows may be: as long as the base has positions for, and as rotary embeddings leave each row alone.

Learned positions end with their table: a token behind it has none. Of rotary embeddings two kinds of `transformers` are
not the same for a row whatever stands beside it, for rows longer than the base was trained on: `dynamic` keeps the
frequencies of the longest row it has met, and `longrope` takes others as soon as one row of a batch is long. A support row
would then cost something else when its graph is built again, and a task something else in the company of another.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from meta_peft.errors import MetaPeftError

LEARNED = "learned"
TABLES = ("wpe", "position_embeddings", "embed_positions")  # what transformers calls a table of learned positions
ENCODER = "encoder."


class RowsTooLongError(MetaPeftError):
    """Rows are longer than the base can read them."""


def check_length(most: int | None, kind: str, length: int) -> None:
    """Raise `RowsTooLongError` if rows are longer than `most` tokens; `most` and `kind` are from `longest`."""
    if most is None or length <= most:
        return
    if kind == LEARNED:
        raise RowsTooLongError(
            f"Rows of {length} tokens are longer than the {most} that the base has learned positions for. Set max_length to"
            f" {most} or less; where examples stand in front of each query, take fewer or shorter ones."
        )
    raise RowsTooLongError(
        f"Rows of {length} tokens are longer than the {most} that rotary embeddings of type {kind} leave alone: beyond"
        f" them the loss of a task depends on the others. Set max_length to {most} or less."
    )


def longest(base: nn.Module) -> tuple[int | None, str]:
    """The most tokens, and the kind of embedding that limits them; None where nothing does."""
    config: Any = base.config
    given = _rotary(config)
    by_kind_of_layer = [part for part in given.values() if isinstance(part, dict)]
    for part in by_kind_of_layer or [given]:
        kind = part.get("rope_type", part.get("type"))
        if kind == "dynamic":
            return config.max_position_embeddings, kind
        if kind == "longrope":
            own = part.get("original_max_position_embeddings")
            return own or getattr(config, "original_max_position_embeddings", config.max_position_embeddings), kind
    hears = getattr(base, "main_input_name", "input_ids") != "input_ids"  # an encoder of sound has no tokens
    modules = (part for part in base.named_modules() if not (hears and ENCODER in part[0]))
    tables = [m for path, m in modules if path.endswith(TABLES) and isinstance(m, nn.Embedding)]
    return min(map(_positions, tables), default=None), LEARNED if tables else ""


def made_for(base: nn.Module) -> int | None:
    """The length in tokens that a base with rotary embeddings is made for; None if its config gives none."""
    whole: Any = base.config
    config = whole.get_text_config()
    return getattr(config, "max_position_embeddings", None) if _rotary(config) else None


def _rotary(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _positions(table: nn.Embedding) -> int:
    """Of some tables the first places are never those of a token: OPT's and BART's have an offset, RoBERTa's a filling."""
    filling = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(getattr(table, "offset", filling))
