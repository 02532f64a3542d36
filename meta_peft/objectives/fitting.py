"""Labels that do not fit their rows: without a check, a wrong loss or an error of an index far below.

Where a device has the rows, each check waits for it, so they are for rows that are new and not for every forward.
"""

from __future__ import annotations

from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.types import Rows

MASK = "attention_mask"
OR_NOTHING = ", or -100 where nothing is to be predicted"


def check_beside(tokens: str, rows: Rows) -> None:
    """Raise unless there is a label for each of the inputs called `tokens`, if the rows have them."""
    given = rows.inputs.get(tokens)
    if given is not None and given.shape != rows.labels_BL.shape:
        raise MetaPeftError(
            f"This model has one label for each of {tokens}, -100 where nothing is to be predicted; got labels of the shape"
            f" {list(rows.labels_BL.shape)} for {tokens} of the shape {list(given.shape)}."
        )


def check_read(predicts_BP: Tensor, rows: Rows) -> None:
    """Raise if a label is to be predicted where the mask is 0: at the first P positions, as `predicts_BP` says.

    What a model computes there depends on how rows were padded, and is left out where that is faster.
    """
    mask_BL = rows.inputs.get(MASK)
    if mask_BL is None or mask_BL.shape != rows.labels_BL.shape:
        return
    n_positions = predicts_BP.shape[1]
    unread_BP = predicts_BP & (mask_BL[:, :n_positions] == 0)
    if unread_BP.any():
        row, position = unread_BP.nonzero()[0].tolist()
        label = position + mask_BL.shape[1] - n_positions
        raise MetaPeftError(
            f"{_name(row, rows)} has a label at position {label}, to be predicted at position {position}, where"
            f" {MASK} is 0: nothing is read there. Set labels to -100 at such positions."
        )


def check_known(labelled_BL: Tensor, rows: Rows, n_known: int | None, otherwise: str = OR_NOTHING) -> None:
    """Raise if a label, where `labelled_BL` says that there is one, is none of 0 to ``n_known - 1``."""
    unknown_BL = rows.labels_BL < 0
    if n_known is not None:
        unknown_BL = unknown_BL | (rows.labels_BL >= n_known)
    unknown_BL = unknown_BL & labelled_BL
    if unknown_BL.any():
        row, position = unknown_BL.nonzero()[0].tolist()
        expected = "0 or more" if n_known is None else f"0 to {n_known - 1}, which this model knows"
        raise MetaPeftError(
            f"{_name(row, rows)} has the label {int(rows.labels_BL[row, position])} at position {position}; expected"
            f" {expected}{otherwise}."
        )


def _name(row: int, rows: Rows) -> str:
    per_task = len(rows.labels_BL) // rows.n_tasks
    return f"Row {row % per_task} of task {row // per_task} of a stack of {rows.n_tasks}"
