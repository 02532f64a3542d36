from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meta_peft import MetaPeftError
from meta_peft.utils.checked import (
    at_least,
    each_once,
    flag,
    is_number,
    is_whole,
    one_of,
    read_object,
    shown,
    text,
    whole,
)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 10**400, [1], 1j])
def test_what_is_no_number(value: Any):
    assert not is_number(value)
    with pytest.raises(MetaPeftError, match="x must be a number of 0 or more; got"):
        at_least("x", value, 0)


@pytest.mark.parametrize(
    "value", [True, np.True_, np.float64(1), 1.0, "1", None, 0, 11, np.int64(11), pytest.param(10**5000, id="long")]
)
def test_what_is_no_whole_number_in_range(value: Any):
    with pytest.raises(MetaPeftError, match="x must be a whole number from 1 to 10; got"):
        whole("x", value, 1, 10)
    assert whole("x", 10, 1, 10) == 10


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), np.array(3)])
def test_whole_numbers_of_other_libraries(value: Any):
    assert type(whole("x", value, 1, 10)) is int


@pytest.mark.parametrize(
    ("value", "expected"), [(0, True), (-3, True), (10**400, True), (True, False), (1.0, False), ("1", False)]
)
def test_what_is_an_int(value: Any, expected: bool):
    assert is_whole(value) is expected


@pytest.mark.parametrize("value", ["", "a\nb", "\x1b[2J", "\ud800", "\x00", "aaaaaa", 3, None])
def test_what_is_no_text_to_show(value: Any):
    with pytest.raises(MetaPeftError, match="x must be a text of 1 to 5 printable characters; got"):
        text("x", value, 5)
    assert text("x", "größe", 5) == "größe"


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_what_is_no_flag(value: Any):
    with pytest.raises(MetaPeftError, match="x must be true or false; got"):
        flag("x", value)


def test_messages_stay_short():
    deep: list = []
    for _ in range(500):
        deep = [deep]
    for value in ("a" * 10**6, [["a" * 100] * 100] * 100, 10**5000, deep, {str(i): i for i in range(1000)}):
        assert 0 < len(shown(value)) < 2000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"a": ' + b"1" * 5000 + b"}"])
def test_what_is_no_object(tmp_path: Path, content: bytes):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(MetaPeftError, match=r"x\.json is damaged or not a config"):
        read_object(tmp_path / "x.json", "a config")


def test_a_file_that_is_too_large(tmp_path: Path):
    (tmp_path / "x.json").touch()
    os.truncate(tmp_path / "x.json", 65_000_000)
    with pytest.raises(MetaPeftError, match="is larger than 64 MB"):
        read_object(tmp_path / "x.json", "a config")


def test_one_of():
    one_of("compare", "full", ("none", "full"))
    with pytest.raises(MetaPeftError, match=r"compare must be one of none, full; got 'ful'\. Did you mean 'full'\?"):
        one_of("compare", "ful", ("none", "full"))
    with pytest.raises(MetaPeftError, match=r"must be one of none, full; got 3\."):
        one_of("compare", 3, ("none", "full"))


def test_an_option_that_is_given_twice():
    each_once(["--a", "--b"])
    with pytest.raises(MetaPeftError, match="--a is given twice: give it once"):
        each_once(["--a", "--b", "--a"])
