"""Values that somebody else may have written: each is of the type and in the range that is expected, or is refused."""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from meta_peft.errors import MetaPeftError, did_you_mean

LARGEST_JSON = 64_000_000  # bytes; a sidecar has about 100 for each LoRA matrix


def at_least(option: str, value: Any, least: float) -> None:
    """Raise unless `value` is a finite number of `least` or more; a bool is no number."""
    if not (is_number(value) and value >= least):
        raise MetaPeftError(f"{option} must be a number of {least} or more; got {shown(value)}.")


def one_of(option: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        meant = did_you_mean(str(value)[:100], choices)
        raise MetaPeftError(f"{option} must be one of {', '.join(choices)}; got {shown(value)}.{meant}")


def each_once(options: Sequence[str]) -> None:
    """Raise if an option is among these twice: argparse would take the last one, without a word."""
    for i, option in enumerate(options):
        if option in options[:i]:
            raise MetaPeftError(
                f"{option} is given twice: give it once, with all of its values where it takes several."
            )


def whole(option: str, value: Any, least: int, most: int) -> int:
    """`value` as an int, or an error unless it is a whole number from `least` to `most`, of NumPy or any other library."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch has errors of its own
        number = None
    if number is None or not least <= number <= most:
        raise MetaPeftError(f"{option} must be a whole number from {least} to {most}; got {shown(value)}.")
    return number


def text(option: str, value: Any, longest: int) -> str:
    """`value`, or an error unless it is a text that can be shown and written: some characters, no control characters."""
    if not (isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()):
        raise MetaPeftError(f"{option} must be a text of 1 to {longest} printable characters; got {shown(value)}.")
    return value


def flag(option: str, value: Any) -> bool:
    """`value`, or an error unless it is a bool."""
    if not isinstance(value, bool):
        raise MetaPeftError(f"{option} must be true or false; got {shown(value)}.")
    return value


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether `value` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def shown(value: Any) -> str:
    """`value` for a message: its repr, cut where it is long or deep."""
    written = _SHORT.repr(value)
    return written if len(written) <= 1000 else f"{written[:1000]}..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out integers of more than some thousand digits.
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        MetaPeftError: there is none, it is too large or it is no JSON; `what` says in the message what it should be.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise MetaPeftError(f"{path} is larger than {LARGEST_JSON // 10**6} MB: it is damaged or not {what}.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except MetaPeftError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise MetaPeftError(f"{path} is damaged or not {what} ({shown(error)}).") from error
    if not isinstance(values, dict):
        raise MetaPeftError(f"{path} is damaged or not {what} (expected an object, got {type(values).__name__}).")
    return values
