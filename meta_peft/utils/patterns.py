"""Regular expressions that came with a config or an adapter: matched with a limit on time.

Some short expressions take longer than anyone can wait, such as ``(a+)+$`` on thirty letters, and Python's `re` cannot
be stopped from inside. So one that could is tried in a process of its own first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache

from meta_peft.errors import MetaPeftError

SECONDS = 5.0
LONGEST = 2000  # characters of an expression
_CAN_BE_SLOW = frozenset("*+?{|(")
_MATCH = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
how, pattern, names = json.load(sys.stdin)
match = getattr(re.compile(pattern), how)
json.dump([match(name) is not None for name in names], sys.stdout)
"""


def check_pattern(option: str, pattern: object) -> None:
    """Raise `MetaPeftError` unless `pattern` is a regular expression."""
    if not isinstance(pattern, str) or len(pattern) > LONGEST:
        raise MetaPeftError(
            f"{option} must be a regular expression of at most {LONGEST} characters; got {str(pattern)[:60]!r}."
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise MetaPeftError(f"{option}={pattern[:200]!r} is not a regular expression: {error}.") from error


@lru_cache(maxsize=256)
def matches(option: str, pattern: str, names: tuple[str, ...], how: str = "search") -> tuple[bool, ...]:
    """Whether ``re.search``, ``re.match`` or ``re.fullmatch`` (`how`) finds `pattern` in each of the names.

    Raises:
        MetaPeftError: it is no regular expression, or takes too long on these names.
    """
    check_pattern(option, pattern)
    if not _CAN_BE_SLOW & set(pattern):
        return tuple(getattr(re, how)(pattern, name) is not None for name in names)
    asked = json.dumps([how, pattern, names])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH], input=asked, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise MetaPeftError(
            f"{option}={pattern[:200]!r} takes too long to match: write it without repeats of repeats, such as (a+)+."
        ) from error
    if done.returncode:
        raise MetaPeftError(f"{option}={pattern[:200]!r} cannot be matched: {done.stderr.strip()[-200:]}")
    return tuple(json.loads(done.stdout))
