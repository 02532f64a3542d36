"""Rows longer than the base knows: without positions, or with rotary embeddings that depend on the company of a row."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from architectures import base_of
from tiny_models import random_rows, tiny_base, with_lora
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from meta_peft import AdapterLoss, MetaPeftError
from meta_peft.functional.row_length import LEARNED, longest


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_that_are_too_long_are_refused(kind: str):
    """Beyond that length one task's loss would depend on the others, or on the calls before."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"original_max_position_embeddings": 8, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    base = tiny_base(max_position_embeddings=8 if kind == "dynamic" else 16, rope_parameters=parameters)
    loss_fn = AdapterLoss(with_lora(base))
    own = dict(loss_fn.weights.parameters())
    loss_fn(own, random_rows(length=8))
    with pytest.raises(MetaPeftError, match=f"9 tokens are longer than the 8 .* type {kind}.*Set max_length to 8"):
        loss_fn(own, random_rows(length=9))
    with pytest.raises(MetaPeftError, match="9 tokens are longer than the 8"):  # as where layers below run once
        loss_fn.within(nullcontext(), own, random_rows(length=9))


def test_rows_behind_a_prompt_are_as_long_as_both():
    """Whole rows were refused, and the same ones behind a prompt that is read once had other losses."""
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    loss_fn = AdapterLoss(with_lora(tiny_base(max_position_embeddings=8, rope_parameters=parameters)))
    own = loss_fn.own()
    with loss_fn.behind([3, 4], own):
        loss_fn.scores(own, random_rows(length=6))
        with pytest.raises(MetaPeftError, match="9 tokens are longer than the 8"):
            loss_fn.scores(own, random_rows(length=7))
    with pytest.raises(MetaPeftError, match="9 tokens are longer than the 8"), loss_fn.behind(list(range(9)), own):
        pass
    loss_fn.scores(own, random_rows(length=8))


def test_other_kinds_have_no_limit():
    assert longest(tiny_base()) == (None, "")
    by_layer = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}
    config = SimpleNamespace(rope_parameters=by_layer, max_position_embeddings=7)
    assert longest(SimpleNamespace(config=config)) == (7, "dynamic")


DECODER = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "vocab_size": 20}
ENCODER = DECODER | {"intermediate_size": 8}
BOTH = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
BOTH |= {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 20}
BOTH |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
WITH_A_TABLE = {
    "gpt2": (AutoModelForCausalLM, {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 20, "n_positions": 9}),
    "opt": (AutoModelForCausalLM, DECODER | {"ffn_dim": 8, "word_embed_proj_dim": 8, "max_position_embeddings": 9}),
    "bert": (AutoModelForMaskedLM, ENCODER | {"max_position_embeddings": 9}),
    "roberta": (AutoModelForMaskedLM, ENCODER | {"max_position_embeddings": 11, "pad_token_id": 1}),
    "bart": (AutoModelForSeq2SeqLM, BOTH | {"max_position_embeddings": 9}),
}


@pytest.mark.parametrize("kind", WITH_A_TABLE)
def test_learned_positions_end_with_their_table(kind: str):
    """What the model itself takes, and what it does not."""
    auto, options = WITH_A_TABLE[kind]
    base = auto.from_config(AutoConfig.for_model(kind, **options)).eval()
    assert longest(base) == (9, LEARNED)
    short, long = (torch.full((1, length), 5) for length in (9, 10))
    base(input_ids=short, **({"decoder_input_ids": short} if kind == "bart" else {}))
    with pytest.raises((IndexError, RuntimeError)):
        base(input_ids=long, **({"decoder_input_ids": long} if kind == "bart" else {}))


def test_positions_of_sound_are_no_limit_of_tokens():
    base = base_of("whisper")
    assert base.config.max_source_positions < base.config.max_target_positions
    assert longest(base) == (base.config.max_target_positions, LEARNED)


def test_rows_beyond_learned_positions_are_refused():
    """Once they were an index out of range, deep in the model."""
    loss_fn = AdapterLoss(with_lora(tiny_base("gpt2", n_positions=9)))
    loss_fn(loss_fn.own(), random_rows(length=9))
    with pytest.raises(
        MetaPeftError, match="Rows of 10 tokens are longer than the 9 that the base has learned positions"
    ):
        loss_fn(loss_fn.own(), random_rows(length=10))


def test_rows_beyond_what_rotary_embeddings_are_made_for_are_read_and_warned_of_once(caplog: pytest.LogCaptureFixture):
    loss_fn = AdapterLoss(with_lora(tiny_base(max_position_embeddings=9)))
    with caplog.at_level("WARNING", "meta_peft"):
        loss_fn(loss_fn.own(), random_rows(length=9))
        assert not caplog.messages
        for length in (10, 11):
            loss_fn(loss_fn.own(), random_rows(length=length))
    (said,) = caplog.messages
    assert said.startswith("Rows of 10 tokens are longer than the 9 that the base is made for")
