"""How a value of a table is written where text is wanted."""

from __future__ import annotations

from typing import Any

LARGEST_WHOLE = 2**53  # up to which every whole number is a float


def written(value: Any) -> str:
    """`value` as text; a whole number has no decimal point.

    A table keeps 3 as 3.0 if its column has 2.5 or nothing in another row. Written as it is kept, the same row would be
    another text in training than where it is adapted on alone.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_WHOLE:
        value = int(value)
    return str(value)
