"""Decoder tokens given the encoder's input: ``-log p(label_p | encoder inputs, decoder input tokens up to p)``.

`Rows.labels_BL` are the labels of the decoder. `Rows.inputs` hold the encoder's inputs (``input_ids``, or
``input_features`` for speech) and ``decoder_input_ids``, which are the labels moved one to the right behind the
decoder's start token: labels and logits stand at the same positions. Where they are missing they are made of the labels, as
transformers does. A row matches exactly when greedy decoding writes its labels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.fitting import check_beside, check_known
from meta_peft.objectives.labelled_tokens import IGNORED, LabelledTokens
from meta_peft.types import Rows

TOKENS = "decoder_input_ids"


class Seq2SeqLM(LabelledTokens):
    """Labels stand at the positions of the decoder."""

    def check(self, rows: Rows, n_known: int | None = None) -> None:
        check_beside(TOKENS, rows)
        check_known(rows.labels_BL != IGNORED, rows, n_known)

    def inputs_of(self, model: Any, rows: Rows) -> dict[str, Tensor]:
        inputs = super().inputs_of(model, rows)
        if TOKENS in inputs or "decoder_inputs_embeds" in inputs:
            return inputs
        return {**inputs, TOKENS: _moved_right(model, rows.labels_BL)}


def _moved_right(model: Any, labels_BL: Tensor) -> Tensor:
    """What transformers itself makes of labels; its models without a method for it have the one formula below."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        made: Tensor = model.prepare_decoder_input_ids_from_labels(labels_BL)
        return made
    start, filling = (getattr(model.config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    if start is None or filling is None:
        raise MetaPeftError(
            f"The rows have no {TOKENS}, and {type(model).__name__} does not say how to make them of labels: give them, the"
            " labels moved one to the right behind the token that the decoder starts with."
        )
    moved_BL = pad(labels_BL[:, :-1], (1, 0), value=start)
    return moved_BL.masked_fill(moved_BL == IGNORED, filling)


SEQ2SEQ_LM = Seq2SeqLM(options={"use_cache": False})
