"""The class of a row: ``-log softmax(logits)[class]`` over all classes that the head has.

`Rows.labels_BL` is ``[B, 1]``, the number of each row's class. Exact match is accuracy. A head has as many classes as the
task with the most; in a task with fewer, the logits of the others are not masked. So what is learned and scored is what
the saved adapter answers in stock PEFT, which knows of no mask: adapting pushes classes without examples down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.fitting import check_known
from meta_peft.objectives.labelled_tokens import LabelledTokens, without_cache
from meta_peft.types import Rows


class SequenceClassification(LabelledTokens):
    """Logits ``[B, C]`` are those of the model's own head, one row of them for each row."""

    def check(self, rows: Rows, n_known: int | None = None) -> None:
        """Each row has one class."""
        n_rows = len(next(iter(rows.inputs.values())))
        if rows.labels_BL.shape != (n_rows, 1):
            raise MetaPeftError(
                f"A classifier of rows has one label for each, [rows, 1]; got labels of the shape"
                f" {list(rows.labels_BL.shape)} for {n_rows} rows."
            )
        check_known(torch.ones_like(rows.labels_BL, dtype=torch.bool), rows, n_known, otherwise="")

    def inputs_of(self, model: Any, rows: Rows) -> dict[str, Tensor]:
        return _padded_as_it_expects(model, super().inputs_of(model, rows))

    def labelled_logits(self, model: nn.Module, head: nn.Module | None, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logits_BC: Tensor = model(**self.inputs_of(model, rows), **without_cache(model)).logits
        return logits_BC, rows.labels_BL[:, 0], torch.arange(len(logits_BC), device=logits_BC.device)


def _padded_as_it_expects(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whatever rows were padded with: a decoder reads its class off the last token that is not the model's padding."""
    filling = getattr(model.config, "pad_token_id", None)
    if filling is None or "attention_mask" not in inputs or "input_ids" not in inputs:
        return inputs
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, filling)}


SEQUENCE_CLASSIFICATION = SequenceClassification()
