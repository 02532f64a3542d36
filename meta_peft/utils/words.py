"""Names and numbers in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def counted(n: int, what: str) -> str:
    """Such as: 1 seed, or 5 seeds."""
    return f"{n} {what}{'s' * (n != 1)}"


def listed(items: Iterable[object]) -> str:
    """Such as: a, b and c."""
    return " and ".join(", ".join(map(str, items)).rsplit(", ", 1))
