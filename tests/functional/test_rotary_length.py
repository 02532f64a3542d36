"""Rotary embeddings that depend on the company of a row, for rows longer than the base knows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_models import random_rows, tiny_base, with_lora

from meta_peft import AdapterLoss, MetaPeftError
from meta_peft.functional.rotary_length import longest


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
    assert longest(tiny_base().config) == (None, "")
    by_layer = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}
    assert longest(SimpleNamespace(rope_parameters=by_layer, max_position_embeddings=7)) == (7, "dynamic")
