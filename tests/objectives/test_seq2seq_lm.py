from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from architectures import base_of, rows_for
from tiny_models import VOCAB
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.seq2seq_lm import SEQ2SEQ_LM
from meta_peft.types import Rows

KINDS = ["t5", "whisper"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_transformers_with_labels(kind: str):
    """Which also moves the labels to the right by itself, to check the inputs given here."""
    model = base_of(kind).eval()
    rows = rows_for(model)
    losses = SEQ2SEQ_LM.loss_per_task(model, model.get_output_embeddings(), rows)
    for t in range(2):
        part = rows.tasks(t, t + 1)
        given = {name: value for name, value in part.inputs.items() if name != "decoder_input_ids"}
        torch.testing.assert_close(losses[t], model(**given, labels=part.labels_BL).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_sees_labelled_positions_only(kind: str):
    model = base_of(kind).eval()
    rows, seen = rows_for(model), []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape))
    logits, labels, _ = SEQ2SEQ_LM.labelled_logits(model, model.get_output_embeddings(), rows)
    assert seen == [(1, (rows.labels_BL != -100).sum(), VOCAB)]
    assert logits.shape == seen[0][1:]
    assert labels.tolist() == rows.labels_BL[rows.labels_BL != -100].tolist()


def test_scaled_hidden_states_are_what_the_head_of_t5_sees():
    """T5 with tied weights multiplies them by ``d_model ** -0.5`` in front of the head."""
    scaled, unscaled = base_of("t5").eval(), base_of("t5", tie_word_embeddings=False).eval()
    assert scaled.config.scale_decoder_outputs
    assert not unscaled.config.scale_decoder_outputs
    unscaled.load_state_dict(scaled.state_dict())
    rows = rows_for(scaled)
    one, other = (SEQ2SEQ_LM.labelled_logits(m, m.get_output_embeddings(), rows)[0] for m in (scaled, unscaled))
    torch.testing.assert_close(one, other * 16**-0.5, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_matches_when_greedy_decoding_writes_its_labels(kind: str):
    model = base_of(kind).eval()
    rows = rows_for(model, n_tasks=1, per_task=2)
    encoded = {n: v for n, v in rows.inputs.items() if n != "decoder_input_ids"}
    ids = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(4):
        ids = torch.cat([ids, model(**encoded, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    labels = ids[:, 1:].clone()
    right = Rows({**encoded, "decoder_input_ids": ids[:, :-1]}, labels, 1)
    wrong_labels = labels.clone()
    wrong_labels[1, -1] = (labels[1, -1] + 1) % VOCAB
    head = model.get_output_embeddings()
    assert SEQ2SEQ_LM.scores_per_task(model, head, right).exact_match_T.tolist() == [1]
    wrong = Rows(right.inputs, wrong_labels, 2)
    assert SEQ2SEQ_LM.scores_per_task(model, head, wrong).exact_match_T.tolist() == [1, 0]


SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 2}


def model_of(kind: str) -> PreTrainedModel:
    """Marian and BART make decoder inputs in a method, mBART its own way; M2M100 and Whisper inside their forward."""
    if kind in KINDS:
        return base_of(kind).eval()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, init_std=0.3, **SIZES, **HEADS, **SPECIAL)
    return AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", [*KINDS, "bart", "mbart", "marian", "m2m_100"])
def test_decoder_inputs_are_made_of_labels_where_they_are_missing(kind: str):
    """As in transformers: without them BART reads the encoder's input again, without an error."""
    model = model_of(kind)
    whole = rows_for(model, n_tasks=3)
    rows = replace(whole, inputs={n: v for n, v in whole.inputs.items() if n != "decoder_input_ids"})
    losses = SEQ2SEQ_LM.loss_per_task(model, model.get_output_embeddings(), rows)
    for t in range(3):
        part = rows.tasks(t, t + 1)
        torch.testing.assert_close(losses[t], model(**part.inputs, labels=part.labels_BL).loss, rtol=1e-6, atol=0)
    if kind in KINDS:
        assert torch.equal(losses, SEQ2SEQ_LM.loss_per_task(model, model.get_output_embeddings(), whole))


def test_decoder_inputs_that_cannot_be_made():
    rows, model = rows_for(base_of("t5")), SimpleNamespace(config=SimpleNamespace(pad_token_id=2))
    assert SEQ2SEQ_LM.inputs_of(model, rows) == rows.inputs
    del rows.inputs["decoder_input_ids"]
    with pytest.raises(MetaPeftError, match="no decoder_input_ids, and SimpleNamespace does not say how to make them"):
        SEQ2SEQ_LM.inputs_of(model, rows)
