"""Names and numbers in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def listed(items: Iterable[object]) -> str:
    """Such as: a, b and c."""
    return " and ".join(", ".join(map(str, items)).rsplit(", ", 1))
