"""Values of NumPy as the texts and numbers that they are: rows that NumPy or pandas made are learned like any others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A scalar of NumPy, or each of a list of them, as Python's own; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)) and any(isinstance(part, np.generic) for part in value):
        return [plain(part) for part in value]
    return value


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of plain values."""
    return {name: plain(value) for name, value in row.items()}
