from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from surface import tiny_tokenizer

from meta_peft.tasks import Encoding, PromptFormat, TaskSet
from meta_peft.tasks.encoding import Facts
from meta_peft.tasks.plain import plain
from meta_peft.tasks.sources import rows_of_task

PAIRS = [
    (np.int64(3), 3),
    (np.float32(0.5), 0.5),
    (np.float64(2.0), 2.0),
    (np.str_("three"), "three"),
    (np.True_, True),
]


@pytest.mark.parametrize(("value", "own"), [*PAIRS, ([np.int64(1), 2], [1, 2]), ((np.str_("a"),), ["a"])])
def test_scalars_of_numpy_are_python_s_own(value: Any, own: Any):
    found = plain(value)
    assert (found, type(found)) == (own, type(own))
    if isinstance(found, list):
        assert all(type(part) in (int, str) for part in found)


@pytest.mark.parametrize("value", ["a", 3, None, [1, "a"], {"array": np.ones(2)}, np.ones(2)])
def test_anything_else_is_left_as_it_is(value: Any):
    assert plain(value) is value


@pytest.mark.parametrize(("value", "own"), PAIRS)
def test_rows_of_numpy_are_those_of_python(value: Any, own: Any):
    """To train on, to adapt to, and for whoever encodes a row alone."""
    row, expected = {"input": value, "target": value}, {"input": own, "target": own}
    assert PromptFormat().render(row) == PromptFormat().render(expected)
    (found,) = rows_of_task([row])
    assert [(v, type(v)) for v in found.values()] == [(own, type(own))] * 2
    assert TaskSet.of([{"task": value, **row}]).rows(str(plain(value)).removesuffix(".0")) == [
        {"task": own, **expected}
    ]


def test_classes_of_numpy():
    how = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=3))
    assert how({"text": "a", "label": np.int64(2)}) == how({"text": "a", "label": 2})
    words = Encoding("token_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=3))
    (row,) = rows_of_task([{"tokens": [np.str_("a")], "tags": [np.int64(2)]}])
    assert words(row) == words({"tokens": ["a"], "tags": [2]})
