"""Whether rows are such that the base can read them, and that they have a loss."""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import nn

from meta_peft.functional.row_length import check_length, longest, made_for
from meta_peft.objectives.labelled_tokens import LabelledTokens
from meta_peft.types import Rows

logger = logging.getLogger("meta_peft")


class RowChecks:
    """What is asked of rows for one base, an objective and the `n_known` tokens or classes that it tells apart."""

    def __init__(self, base: nn.Module, objective: LabelledTokens, n_known: int | None):
        self._objective, self._n_known = objective, n_known
        self._most, self._kind = longest(base)
        self._made_for = made_for(base)
        self._labelled: WeakSet[Rows] = WeakSet()

    def labels(self, rows: Rows) -> None:
        """Raise unless labels fit their rows; asked when they come for the first time, since a device has to answer."""
        if rows not in self._labelled:
            self._objective.check(rows, self._n_known)
            self._labelled.add(rows)

    def readable(self, rows: Rows, behind: int = 0) -> None:
        """Raise `RowsTooLongError` if rows that stand behind so many tokens of a prompt are too long for the base."""
        length = rows.labels_BL.shape[-1] if "input_ids" not in rows.inputs else rows.inputs["input_ids"].shape[-1]
        self.length(length + behind)

    def length(self, length: int) -> None:
        """The same of a number of tokens."""
        check_length(self._most, self._kind, length)
        if self._made_for is not None and length > self._made_for:
            logger.warning(
                "Rows of %d tokens are longer than the %d that the base is made for (max_position_embeddings of its"
                " config): it may read them badly. Set max_length to %d or less.",
                *(length, self._made_for, self._made_for),
            )
            self._made_for = None  # said once
