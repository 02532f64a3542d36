"""The encoder reads words, a head names the class of each, at its first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.encoding.classes import class_number, class_of
from meta_peft.tasks.encoding.special_tokens import special_tokens
from meta_peft.tasks.prompt import TAGGED
from meta_peft.utils.checked import shown

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def encode(row: Mapping[str, Any], how: Encoding) -> dict[str, Any]:
    """`input_ids` and `labels`, ``[L]`` each, -100 but at the first token of each word. A long row loses its end."""
    words, tags = row.get("tokens"), label(row)
    if not (isinstance(words, list) and isinstance(tags, list) and 0 < len(words) == len(tags)):
        raise MetaPeftError(
            f"Expected a column tokens with a list of words and a column tags with as many classes; got {shown(dict(row))}."
        )
    if not all(isinstance(word, str) for word in words):
        raise MetaPeftError(f"Column 'tokens' must hold words; got {shown(words)}.")
    before, behind = special_tokens(how.tokenizer)
    ids, labels = list(before), [IGNORED] * len(before)
    # Each word by itself, with a space in front, which most tokenizers take for the start of a word.
    for pieces, tag in zip(
        how.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"], tags, strict=True
    ):
        pieces = pieces or [_unknown(how)]
        if len(ids) + len(pieces) + len(behind) > how.max_length:
            break
        ids += pieces
        labels += [class_of(tag, how)] + [IGNORED] * (len(pieces) - 1)
    return {"input_ids": [*ids, *behind], "labels": [*labels, *[IGNORED] * len(behind)]}


def lost_words(row: Mapping[str, Any], features: Mapping[str, Any]) -> bool:
    """Whether the features of a row have no room for all of its words."""
    return sum(label != IGNORED for label in features["labels"]) < len(row["tokens"])


def with_label(features: Mapping[str, Any], label: list[int], how: Encoding) -> dict[str, Any]:
    """`label` has a class for each word."""
    places = [i for i, old in enumerate(features["labels"]) if old != IGNORED]
    labels = list(features["labels"])
    for place, new in zip(places, label, strict=True):
        labels[place] = class_number(new, how)
    return {**features, "labels": labels}


def label(row: Mapping[str, Any]) -> Any:
    """The classes of a row's words."""
    return next((row[column] for _, column in TAGGED if column in row), None)


def _unknown(how: Encoding) -> int:
    unknown: int | None = how.tokenizer.unk_token_id
    if unknown is None:
        raise MetaPeftError("A word has no token, and the tokenizer none for unknown words: leave the word out.")
    return unknown
