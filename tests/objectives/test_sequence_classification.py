from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from heads import model_of, rows_of
from tiny_models import tiny_base
from transformers import AutoConfig, AutoModelForSequenceClassification

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import without_cache
from meta_peft.objectives.sequence_classification import SEQUENCE_CLASSIFICATION


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "llama"])
def test_loss_is_that_of_transformers_with_labels(case: str):
    model, rows = model_of(case).get_base_model().eval(), rows_of(case)
    losses = SEQUENCE_CLASSIFICATION.loss_per_task(model, None, rows)
    for t in range(2):
        part = rows.tasks(t, t + 1)
        expected = model(**part.inputs, labels=part.labels_BL[:, 0]).loss
        torch.testing.assert_close(losses[t], expected, rtol=1e-12, atol=0)


def test_exact_match_is_accuracy():
    model, rows = model_of("bert").get_base_model().eval(), rows_of("bert", n_tasks=2, per_task=2)
    predicted = SEQUENCE_CLASSIFICATION.scores_per_task(model, None, rows).predicted_BL
    assert predicted.shape == (4, 1)
    assert torch.equal(predicted[:, 0], model(**rows.inputs).logits.argmax(-1))
    rows.labels_BL.copy_(predicted)
    rows.labels_BL[3] = (predicted[3] + 1) % 3
    assert SEQUENCE_CLASSIFICATION.scores_per_task(model, None, rows).exact_match_T.tolist() == [1, 0.5]


def test_a_decoder_remembers_no_keys():
    assert without_cache(tiny_base()) == {"use_cache": False}
    config = AutoConfig.for_model("bert", hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    assert without_cache(AutoModelForSequenceClassification.from_config(config)) == {}


@pytest.mark.parametrize("filling", [0, 5])
def test_whatever_rows_are_padded_with_a_decoder_reads_their_last_token(filling: int):
    """It looks for the last token that is not its own padding, whatever the mask says."""
    model, rows = model_of("llama").get_base_model().eval(), rows_of("llama")
    assert model.config.pad_token_id != filling
    expected = SEQUENCE_CLASSIFICATION.loss_per_task(model, None, rows)
    n = len(rows.labels_BL)
    more = {"input_ids": torch.full((n, 3), filling), "attention_mask": torch.zeros(n, 3, dtype=torch.long)}
    padded = {name: torch.cat([rows.inputs[name], more[name]], 1) for name in more}
    found = SEQUENCE_CLASSIFICATION.loss_per_task(model, None, replace(rows, inputs=padded))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1]] * 4, r"one label for each, \[rows, 1\]; got labels of the shape \[4, 2\] for 4 rows"),
        ([[0]] * 2, r"got labels of the shape \[2, 1\] for 4 rows"),
        ([[0], [2], [-100], [1]], "Row 0 of task 1 of a stack of 2 has the label -100 at position 0; expected 0 to 2"),
    ],
)
def test_every_row_has_one_class(labels: list[list[int]], message: str):
    rows = replace(rows_of("bert"), labels_BL=torch.tensor(labels))
    with pytest.raises(MetaPeftError, match=message) as found:
        SEQUENCE_CLASSIFICATION.check(rows, 3)
    assert "or -100" not in str(found.value)
