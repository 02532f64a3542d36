from __future__ import annotations

import pytest

from meta_peft.utils.words import listed


@pytest.mark.parametrize(
    ("items", "words"), [([], ""), ([1], "1"), ([1, 3], "1 and 3"), (["a", "b, c", "d"], "a, b, c and d")]
)
def test_names_in_a_sentence(items: list[object], words: str):
    assert listed(items) == words
