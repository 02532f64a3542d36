"""The class of each word: ``-log softmax(logits_p)[class_p]`` at the labelled positions p of each row.

`Rows.labels_BL` holds the class of a word at its first token, -100 at its other tokens and at special tokens. A task's
loss is the mean over its words; a row matches when all its words are right. Classes that a task does not have are treated
as in `sequence_classification`.
"""

from __future__ import annotations

from torch import Tensor, nn

from meta_peft.objectives.labelled_tokens import (
    IGNORED,
    LabelledTokens,
    check_every_task_has_labels,
    without_cache,
)
from meta_peft.types import Rows


class TokenClassification(LabelledTokens):
    """Logits ``[B, L, C]`` are those of the model's own head, of which the labelled positions count."""

    def labelled_logits(self, model: nn.Module, head: nn.Module | None, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logits_BLC: Tensor = model(**self.inputs_of(model, rows), **without_cache(model)).logits
        row_N, position_N = (rows.labels_BL != IGNORED).nonzero(as_tuple=True)
        check_every_task_has_labels(row_N, rows)
        return logits_BLC[row_N, position_N], rows.labels_BL[row_N, position_N], row_N


TOKEN_CLASSIFICATION = TokenClassification()
