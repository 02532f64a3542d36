"""Figures of matplotlib, which is not everywhere."""

from __future__ import annotations

from typing import Any

from meta_peft.errors import MetaPeftError

NO_MATPLOTLIB = "The {} needs matplotlib: pip install 'meta-peft[demo]'."


def new_figure(width: float, height: float, what: str = "picture") -> Any:
    """An empty figure of this size in inches, and what it is for.

    Raises:
        MetaPeftError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetaPeftError(NO_MATPLOTLIB.format(what)) from error
    return Figure(figsize=(width, height), layout="constrained")
