"""The encoder reads the prompt, a head names the class of the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meta_peft.tasks.encoding.classes import class_number, class_of
from meta_peft.tasks.encoding.texts import prompt_and_completion, read, tokens
from meta_peft.tasks.prompt import example_columns

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def encode(row: Mapping[str, Any], how: Encoding) -> dict[str, Any]:
    """`input_ids` ``[L]`` and `labels` ``[1]``, the number of the class."""
    prompt, _ = prompt_and_completion(row, how)
    return {"input_ids": read(tokens(prompt, how), how), "labels": [class_of(label(row), how)]}


def with_label(features: Mapping[str, Any], label: int, how: Encoding) -> dict[str, Any]:
    return {**features, "labels": [class_number(label, how)]}


def label(row: Mapping[str, Any]) -> Any:
    """The class of a row: what stands in the second of its two columns."""
    return row[example_columns(row.keys())[-1]]
