"""Prompt and completion in one row, the completion labelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def encode(row: Mapping[str, Any], how: Encoding) -> dict[str, Any]:
    """`input_ids` and `labels`, ``[L]`` each."""
    return dict(how.prompt_format.encode(row, how.tokenizer, how.max_length))


def with_label(features: Mapping[str, Any], label: str, how: Encoding) -> dict[str, Any]:
    return dict(how.prompt_format.with_label(features, label, how.tokenizer, how.max_length))
