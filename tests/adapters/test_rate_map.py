"""Rates by layer and matrix: where each is put, and how the map looks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from meta_peft import MetaPeftError
from meta_peft.adapters.rate_map import RateMap, check_picture

LAYERS = (2, 10)
NAMES = [
    f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.weight"
    for layer in LAYERS
    for module in ("q_proj", "v_proj")
    for matrix in "AB"
]


def rate_map(rates: list[float], names: list[str] = NAMES) -> RateMap:
    return RateMap.of(names, torch.tensor([rates]).log())


def test_each_rate_is_in_the_row_of_its_layer_and_the_column_of_its_matrix():
    found = rate_map([1, 2, 3, 4, 5, 6, 7, 8])
    assert found.rows == ("2", "10"), "in the order of numbers"
    assert found.columns == ("q_proj A", "q_proj B", "v_proj A", "v_proj B")
    np.testing.assert_allclose(found.rates, [[1, 2, 3, 4], [5, 6, 7, 8]], rtol=1e-6)


def test_steps_are_averaged_as_logarithms():
    found = RateMap.of(NAMES[:1], torch.tensor([[math.log(1e-4)], [math.log(1e-2)]]))
    assert found.rates[0, 0] == pytest.approx(1e-3)


def test_matrices_that_only_some_layers_have():
    found = rate_map([1, 2], [NAMES[0], NAMES[7]])
    assert np.isnan(found.rates).tolist() == [[False, True], [True, False]]
    assert "nan" not in found.as_text(80)


def test_what_is_in_no_layer_has_a_row_of_its_own():
    names = [NAMES[0], "base_model.model.score.weight", "base_model.model.model.embed_tokens.lora_embedding_A"]
    found = rate_map([1, 2, 3], names)
    assert found.rows == ("2", "-")
    assert found.columns[1:] == ("score.weight", "embed_tokens A")


def test_modules_of_one_name_have_columns_of_their_own():
    """The encoder's, the decoder's and the one between them, as in Whisper; and what DoRA has besides."""
    modules = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"]
    names = [f"base_model.model.model.{module}.q_proj.lora_A.weight" for module in modules]
    names += [names[2].replace("lora_A.weight", "lora_magnitude_vector")]
    found = rate_map([1, 2, 3, 4], names)
    assert found.rows == ("0",)
    expected = ("encoder.layers.self_attn.q_proj A", "decoder.layers.self_attn.q_proj A")
    assert found.columns == (*expected, "encoder_attn.q_proj A", "encoder_attn.q_proj m")
    np.testing.assert_allclose(found.rates, [[1, 2, 3, 4]], rtol=1e-6)


def test_dark_is_high():
    lines = rate_map([1e-4, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]).as_text(100).splitlines()
    assert lines[0].split() == ["layer", "q_proj", "A", "q_proj", "B", "v_proj", "A", "v_proj", "B"]
    assert "██ 1.0e-02" in lines[1]
    assert "▒▒ 1.0e-03" in lines[1]
    assert len(lines) == 3


def test_a_narrow_terminal_gets_shades_and_a_key():
    text = rate_map([1e-4, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]).as_text(30)
    assert max(map(len, text.splitlines())) <= 30
    assert " 4  v_proj B" in text
    assert "e-03" not in text


def test_equal_rates_have_one_shade():
    assert "█" not in rate_map([1e-3] * 8).as_text(100)


def test_a_picture(tmp_path):
    rate_map([1, 2, 3, 4, 5, 6, 7, 8]).figure().savefig(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_a_picture_of_an_ending_that_there_is_not():
    with pytest.raises(MetaPeftError, match=r"cannot be written as rates\.xyz, by its ending: .* it knows .*, png, "):
        check_picture("rates.xyz")
    for path in ("rates.png", "folder.v2/rates.PDF", "rates"):
        check_picture(path)
