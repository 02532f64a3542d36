"""Prompts and completions as text and as tokens, for all kinds of models but those that write on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoding.special_tokens import special_tokens
from meta_peft.tasks.prompt import example_columns
from meta_peft.tasks.written import written

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def prompt_and_completion(row: Mapping[str, Any], how: Encoding) -> tuple[str, str]:
    """The two texts of a row."""
    if example_columns(row.keys()) == ("messages",):
        raise MetaPeftError(
            f"Rows are conversations, which {how.objective} does not read: give a column for the input and one for the"
            " answer, such as input and target."
        )
    return how.prompt_format.render(row)


def completion(label: Any, how: Encoding) -> str:
    """Another answer in the place of the completion."""
    return how.prompt_format.completion_template.replace("{target}", written(label))


def tokens(text: str, how: Encoding, *, of: str = "text") -> list[int]:
    """The tokens of a text, without any that the tokenizer puts around it."""
    ids: list[int] = how.tokenizer(**{of: text}, add_special_tokens=False)["input_ids"]
    return ids


def read(prompt: list[int], how: Encoding, *, room: int | None = None) -> list[int]:
    """A prompt between the tokenizer's special tokens. If it does not fit, it loses its start."""
    before, behind = special_tokens(how.tokenizer)
    room = (how.max_length if room is None else room) - len(before) - len(behind)
    return [*before, *prompt[max(0, len(prompt) - max(room, 0)) :], *behind]


def check_answer(length: int, how: Encoding) -> None:
    """Raise unless an answer of so many tokens fits."""
    if length >= how.max_length:
        raise MetaPeftError(
            f"A completion of {length} tokens does not fit max_length={how.max_length}: raise max_length."
        )
