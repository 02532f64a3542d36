"""What a column of text may hold."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Value

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.prompt import ANSWERS, NOT_TEXT
from meta_peft.utils.checked import shown

WRITTEN = ("string", "large_string", "string_view", "bool", "int", "uint", "float", "null")  # what these begin with


def check_text(table: Dataset, form: tuple[str, ...], read: Sequence[str]) -> None:
    """Raise if a column of text holds lists, objects or the like.

    Args:
        form: the columns that hold the example.
        read: all columns that are read.
    """
    for column in _of_text(form, read):
        kind = table.features[column]
        if isinstance(kind, ClassLabel) or (isinstance(kind, Value) and kind.dtype.startswith(WRITTEN)):
            continue
        values = enumerate(table.select_columns([column]), start=1)
        number, row = next(((n, row) for n, row in values if row[column] is not None), (1, {column: None}))
        raise MetaPeftError(
            f"Column {column!r} must hold text or numbers; row {number} has {shown(row[column])}. Make a text of it."
        )


def _of_text(form: tuple[str, ...], read: Sequence[str]) -> list[str]:
    if form in NOT_TEXT or form == ("messages",):
        return []
    own = form[:1] if form == ANSWERS else form
    return [*own, *(column for column in read if column == "context")]
