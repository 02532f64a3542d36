from __future__ import annotations

import pytest
import torch
from heads import model_of, rows_of

from meta_peft import MetaPeftError
from meta_peft.objectives.token_classification import TOKEN_CLASSIFICATION


def test_loss_is_that_of_transformers_with_labels():
    model, rows = model_of("bert, tokens").get_base_model().eval(), rows_of("bert, tokens")
    losses = TOKEN_CLASSIFICATION.loss_per_task(model, None, rows)
    for t in range(2):
        part = rows.tasks(t, t + 1)
        expected = model(**part.inputs, labels=part.labels_BL).loss
        torch.testing.assert_close(losses[t], expected, rtol=1e-12, atol=0)


def test_a_row_matches_when_all_its_words_are_right():
    model, rows = model_of("bert, tokens").get_base_model().eval(), rows_of("bert, tokens")
    predicted, labelled = TOKEN_CLASSIFICATION.scores_per_task(model, None, rows).predicted_BL, rows.labels_BL != -100
    everything = model(**rows.inputs).logits.argmax(-1)
    assert torch.equal(predicted, everything.where(labelled, -100))
    rows.labels_BL.copy_(predicted)
    assert TOKEN_CLASSIFICATION.scores_per_task(model, None, rows).exact_match_T.tolist() == [1, 1]
    last = labelled[0].nonzero().max()
    rows.labels_BL[0, last] = (predicted[0, last] + 1) % 3
    assert TOKEN_CLASSIFICATION.scores_per_task(model, None, rows).exact_match_T.tolist() == [0.5, 1]


def test_a_task_without_a_labelled_word_is_refused():
    model, rows = model_of("bert, tokens").get_base_model().eval(), rows_of("bert, tokens")
    rows.labels_BL[: len(rows.labels_BL) // 2] = -100
    with pytest.raises(MetaPeftError, match="Task 0 of a stack of 2 has no label"):
        TOKEN_CLASSIFICATION.loss_per_task(model, None, rows)
