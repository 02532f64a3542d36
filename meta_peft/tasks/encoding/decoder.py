"""What a decoder is given and what it has to write: the labels moved one to the right, behind what it starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.encoding.texts import check_answer, tokens

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def answer(text: str, how: Encoding) -> dict[str, Any]:
    """`decoder_input_ids` and `labels`, ``[L]`` each.

    The text ends with the end-of-sequence token. What a decoder starts with is given in use too, so it is not labelled.
    """
    start = list(how.facts.decoder_prefix)
    if not start:
        raise MetaPeftError("A decoder has to start with a token: make the encoding with Encoding.of(model, ...).")
    ids = [*tokens(text, how, of="text_target"), how.tokenizer.eos_token_id]
    check_answer(len(start) + len(ids) - 1, how)
    return {"decoder_input_ids": [*start, *ids[:-1]], "labels": [IGNORED] * (len(start) - 1) + ids}
