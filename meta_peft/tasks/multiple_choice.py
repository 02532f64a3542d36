"""Rows with answers to choose from: a column `choices` with a list of texts, and the right one, by text or by number.

The right answer is what is learned, as in any other row. The others are encoded beside it, so that evaluation can ask
which answer is likeliest. All of a row's answers stand behind the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.utils.checked import is_whole, shown

CHOICES = "choices"
Features = dict[str, Any]


def encode_with_choices(
    row: Mapping[str, Any], column: str, encode: Callable[[Mapping[str, Any]], Features]
) -> Features:
    """The features of the row with its right answer, and ``choices``: the tokens of each answer.

    Args:
        row: with a column `CHOICES`, which is None if this row has none.
        column: where the right answer stands: as one of the choices, or as its number, from 0.
        encode: makes features, ``labels`` among them, of a row with a text in `column` and no choices.

    Raises:
        MetaPeftError: the choices are not two or more different texts, or the answer is none of them.
    """
    plain = {name: value for name, value in row.items() if name != CHOICES}
    if row[CHOICES] is None:
        return {**encode(plain), CHOICES: None}
    texts, right = _checked(row, column)
    each = [encode({**plain, column: text}) for text in texts]
    answers = [[token for token in features["labels"] if token != IGNORED] for features in each]
    if len({tuple(answer) for answer in answers}) < len(answers):
        raise MetaPeftError(f"Two of the choices {shown(texts)} are the same tokens, so none of them can be chosen.")
    if all(f["input_ids"][-len(a) :] == a for f, a in zip(each, answers, strict=True)):
        # The answer follows the prompt, which was cut most for the longest answer if it had to be cut.
        prompts = [f["input_ids"][: -len(a)] for f, a in zip(each, answers, strict=True)]
        prompt = min(prompts, key=len)
        labels = [IGNORED] * len(prompt) + answers[right]
        return {"input_ids": prompt + answers[right], "labels": labels, CHOICES: answers}
    return {**each[right], CHOICES: answers}


def stacked_choices(rows: Sequence[Features]) -> Tensor | None:
    """The choices of all rows as one tensor, ``[B, C, L]``, -100 where a row has fewer or an answer is shorter."""
    choices = [row.get(CHOICES) or [] for row in rows]
    if not any(choices):
        return None
    most, longest = max(map(len, choices)), max(len(answer) for answers in choices for answer in answers)
    stacked = torch.full((len(rows), most, longest), IGNORED)
    for i, answers in enumerate(choices):
        for j, answer in enumerate(answers):
            stacked[i, j, : len(answer)] = torch.tensor(answer)
    return stacked


def _checked(row: Mapping[str, Any], column: str) -> tuple[list[str], int]:
    """The texts to choose from, and the number of the right one."""
    texts, answer = row[CHOICES], row.get(column)
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise MetaPeftError(f"Column {CHOICES!r} must hold a list of texts, none of them empty; got {shown(texts)}.")
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise MetaPeftError(f"Column {CHOICES!r} must hold two or more different texts; got {shown(texts)}.")
    if is_whole(answer) and 0 <= answer < len(texts):
        return texts, answer
    if isinstance(answer, str) and answer in texts:
        return texts, texts.index(answer)
    raise MetaPeftError(
        f"Column {column!r} must hold one of the {CHOICES}, or its number from 0 to {len(texts) - 1}; got {shown(answer)}"
        f" for {shown(texts)}."
    )
