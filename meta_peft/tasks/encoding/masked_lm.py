"""The completion is masked: as many mask tokens as it has tokens, all filled in at once.

They stand where the prompt names the mask token, once, as in ``{input} It was <mask>.``, or else behind the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.encoding.texts import check_answer, completion, prompt_and_completion, read, tokens

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def encode(row: Mapping[str, Any], how: Encoding) -> dict[str, Any]:
    """`input_ids` and `labels`, ``[L]`` each."""
    prompt, target = prompt_and_completion(row, how)
    ids, mask = tokens(prompt, how), _mask(how)
    if ids.count(mask) > 1:
        raise MetaPeftError(
            f"The prompt names the mask token {ids.count(mask)} times, and a row has one completion: name it once."
        )
    place = ids.index(mask) if mask in ids else len(ids)
    return _filled(ids[:place], ids[place + 1 :], target, how)


def with_label(features: Mapping[str, Any], label: str, how: Encoding) -> dict[str, Any]:
    ids, mask = list(features["input_ids"]), _mask(how)
    first, n = ids.index(mask), ids.count(mask)
    new = tokens(completion(label, how), how)
    check_answer(len(ids) - n + len(new), how)
    return _with_answer([*ids[:first], *[mask] * len(new), *ids[first + n :]], new, how)


def _filled(before: list[int], behind: list[int], target: str, how: Encoding) -> dict[str, Any]:
    """What does not fit is cut at the start of what stands before the masks, or at the end of what stands behind."""
    answer = tokens(target, how)
    around = len(read([], how))
    check_answer(len(answer) + around, how)
    room = how.max_length - around - len(answer)
    behind = behind[:room]
    before = before[max(0, len(before) + len(behind) - room) :]
    return _with_answer(read([*before, *[_mask(how)] * len(answer), *behind], how), answer, how)


def _with_answer(ids: list[int], answer: list[int], how: Encoding) -> dict[str, Any]:
    if not answer:
        raise MetaPeftError("A completion has no token, so there is nothing to fill in: give another one.")
    first = ids.index(_mask(how))
    labels = [*[IGNORED] * first, *answer, *[IGNORED] * (len(ids) - first - len(answer))]
    return {"input_ids": ids, "labels": labels}


def _mask(how: Encoding) -> int:
    mask: int | None = how.tokenizer.mask_token_id
    if mask is None:
        raise MetaPeftError("The tokenizer has no mask token: masked_lm needs a model made for it, such as BERT.")
    return mask
