"""The one error type that users of meta_peft need to know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetaPeftError(ValueError):
    """Something given to meta_peft cannot be used: the message says what was expected, what came and what to do."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
