from __future__ import annotations

import re
import time

import pytest

from meta_peft import MetaPeftError
from meta_peft.utils import patterns
from meta_peft.utils.patterns import check_pattern, matches

NAMES = ("layers.1.q_proj.lora_A.weight", "layers.28.q_proj.lora_B.weight", "layers.29.v_proj.lora_A.weight", "größe\n")


@pytest.mark.parametrize("how", ["search", "match", "fullmatch"])
@pytest.mark.parametrize("pattern", ["lora_A", r"layers\.(28|29)\.", ".*_proj.*", "", "^größe$", "layers.[0-9]"])
def test_as_re_does_it(pattern: str, how: str):
    assert matches("x", pattern, NAMES, how) == tuple(bool(getattr(re, how)(pattern, name)) for name in NAMES)


def test_what_takes_too_long_is_refused_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(MetaPeftError, match=r"fast_weights='\(a\+\)\+\$' takes too long to match: write it without"):
        matches("fast_weights", "(a+)+$", ("a" * 60 + "b",))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{99999999999999999999}", "(" * 900 + ")" * 900])
def test_what_is_no_expression(pattern: str):
    with pytest.raises(MetaPeftError, match="is not a regular expression"):
        check_pattern("x", pattern)


@pytest.mark.parametrize("pattern", [3, None, ["a"], "a" * 2001])
def test_what_is_no_text_or_too_long(pattern: object):
    with pytest.raises(MetaPeftError, match="x must be a regular expression of at most 2000 characters"):
        check_pattern("x", pattern)
