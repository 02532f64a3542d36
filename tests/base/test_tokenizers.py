from __future__ import annotations

from pathlib import Path

import pytest
from surface import SPECIAL, tiny_folder, tiny_tokenizer

from meta_peft import MetaPeftError
from meta_peft.base import load_tokenizer


def test_the_tokenizer_comes_with_padding(tmp_path: Path):
    assert load_tokenizer(str(tiny_folder())).pad_token == "<pad>"
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == SPECIAL["eos_token"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(MetaPeftError, match="has no end-of-sequence token, so no completion could end"):
        load_tokenizer(str(tmp_path))
