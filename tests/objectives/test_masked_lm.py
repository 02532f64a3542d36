from __future__ import annotations

import pytest
import torch
from architectures import base_of, rows_for
from tiny_models import VOCAB

from meta_peft.objectives.masked_lm import MASKED_LM

KINDS = ["bert", "distilbert", "roberta"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_transformers_with_labels(kind: str):
    model = base_of(kind).eval()
    rows = rows_for(model)
    losses = MASKED_LM.loss_per_task(model, model.get_output_embeddings(), rows)
    for t in range(2):
        part = rows.tasks(t, t + 1)
        torch.testing.assert_close(losses[t], model(**part.inputs, labels=part.labels_BL).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_sees_labelled_positions_only(kind: str):
    """The first position included, which no causal model could predict."""
    model = base_of(kind).eval()
    rows, seen = rows_for(model), []
    rows.labels_BL[:, 0] = 7
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape))
    _, labels, _ = MASKED_LM.labelled_logits(model, model.get_output_embeddings(), rows)
    assert seen == [(1, (rows.labels_BL != -100).sum(), VOCAB)]
    assert labels.tolist() == rows.labels_BL[rows.labels_BL != -100].tolist()


def test_a_row_matches_when_every_masked_token_is_filled_in():
    model = base_of("bert").eval()
    rows = rows_for(model, n_tasks=2, per_task=1)
    likeliest = model(**rows.inputs).logits.argmax(-1)
    rows.labels_BL.copy_(torch.where(rows.labels_BL != -100, likeliest, rows.labels_BL))
    head = model.get_output_embeddings()
    assert MASKED_LM.scores_per_task(model, head, rows).exact_match_T.tolist() == [1, 1]
    rows.labels_BL[1, 1] = (rows.labels_BL[1, 1] + 1) % VOCAB
    assert MASKED_LM.scores_per_task(model, head, rows).exact_match_T.tolist() == [1, 0]
