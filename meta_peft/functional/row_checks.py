"""Whether rows are such that the base can read them, and that they have a loss."""

from __future__ import annotations

from weakref import WeakSet

from torch import nn

from meta_peft.functional.row_length import check_length, longest
from meta_peft.objectives.labelled_tokens import LabelledTokens
from meta_peft.types import Rows


class RowChecks:
    """What is asked of rows for one base, an objective and the `n_known` tokens or classes that it tells apart."""

    def __init__(self, base: nn.Module, objective: LabelledTokens, n_known: int | None):
        self._objective, self._n_known = objective, n_known
        self._most, self._kind = longest(base)
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
