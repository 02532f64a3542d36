from __future__ import annotations

import pytest
import torch
from architectures import base_of, rows_for
from tiny_models import VOCAB

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
