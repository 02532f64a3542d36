"""The encoder reads the prompt, the decoder writes the completion (T5 and its kind)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meta_peft.tasks.encoding.decoder import answer
from meta_peft.tasks.encoding.texts import completion, prompt_and_completion, read, tokens

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def encode(row: Mapping[str, Any], how: Encoding) -> dict[str, Any]:
    """`input_ids` ``[S]``; `decoder_input_ids` and `labels` ``[L]``."""
    prompt, target = prompt_and_completion(row, how)
    return {"input_ids": read(tokens(prompt, how), how), **answer(target, how)}


def with_label(features: Mapping[str, Any], label: str, how: Encoding) -> dict[str, Any]:
    return {**features, **answer(completion(label, how), how)}
