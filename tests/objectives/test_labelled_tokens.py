from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, random_rows, tiny, tiny_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from meta_peft import AdapterLoss, MetaPeftError
from meta_peft.objectives import labelled_tokens, objective_for
from meta_peft.objectives.causal_lm import CAUSAL_LM
from meta_peft.types import Rows


@pytest.fixture(scope="module")
def model():
    return tiny_base().eval()


@pytest.fixture(scope="module")
def head(model):
    return model.get_output_embeddings()


def test_each_task_is_averaged_over_its_own_labels(model, head):
    """Tasks here have different numbers of labels: a mean over rows, or over the stack, would show."""
    rows = random_rows()
    counts = [(rows.tasks(t, t + 1).labels_BL[:, 1:] != -100).sum().item() for t in range(3)]
    assert len(set(counts)) > 1
    loss_T = CAUSAL_LM.loss_per_task(model, head, rows)
    for t in range(3):
        one = rows.tasks(t, t + 1)
        logits = model(**one.inputs).logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(loss_T[t], F.cross_entropy(logits, one.labels_BL[:, 1:].flatten()))


OF_PROPHETNET = {
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
}
OF_MOBILEBERT = {"num_attention_heads": 2, "num_hidden_layers": 1, "embedding_size": 8, "intra_bottleneck_size": 16}


@pytest.mark.parametrize(
    ("kind", "sizes", "loaded_with", "given"),
    [
        ("prophetnet", OF_PROPHETNET, AutoModelForCausalLM, r"\[\(6, 2, 6\)\]"),  # two tokens ahead at once
        ("mobilebert", {**OF_MOBILEBERT, "true_hidden_size": 16}, AutoModelForMaskedLM, "nothing"),  # its weight alone
    ],
)
def test_heads_that_do_not_read_rows_as_they_are(kind: str, sizes: dict, loaded_with: Any, given: str):
    """Once these ended in errors of an index, and of a shape."""
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, pad_token_id=2, hidden_size=16, **sizes)
    base = loaded_with.from_config(config).eval()
    rows = random_rows(length=7 if kind == "prophetnet" else 6)
    with pytest.raises(
        MetaPeftError, match=rf"does not make its logits by giving .*; it gave it {given}\. So it is not"
    ):
        objective_for(base).loss_per_task(base, base.get_output_embeddings(), rows)


def test_other_tasks_of_the_stack_do_not_matter(model, head):
    rows = random_rows()
    whole = CAUSAL_LM.loss_per_task(model, head, rows)
    parts = [CAUSAL_LM.loss_per_task(model, head, rows.tasks(t, t + 1)) for t in range(3)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=0)


def test_cross_entropy_is_computed_in_float32_at_least():
    model = tiny_base("llama", torch.bfloat16).eval()
    loss_T = CAUSAL_LM.loss_per_task(model, model.get_output_embeddings(), random_rows())
    assert loss_T.dtype == torch.float32


def test_a_row_matches_if_every_label_is_the_most_likely_token(model, head):
    """Rows of two tasks: one right, one wrong at its first label, one at its last; and one right."""
    ids = torch.randint(3, VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    likeliest = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    labels[:, 3:] = likeliest[:, 2:5]
    labels[1, 3] = (labels[1, 3] + 1) % VOCAB
    labels[2, 5] = (labels[2, 5] + 1) % VOCAB
    scores = CAUSAL_LM.scores_per_task(model, head, Rows({"input_ids": ids, "attention_mask": mask}, labels, 2))
    assert scores.exact_match_T.tolist() == [0.5, 0.5]
    three = Rows({"input_ids": ids[:3], "attention_mask": mask[:3]}, labels[:3], 3)
    assert CAUSAL_LM.scores_per_task(model, head, three).exact_match_T.tolist() == [1, 0, 0]
    torch.testing.assert_close(
        scores.loss_T, CAUSAL_LM.loss_per_task(model, head, Rows({"input_ids": ids, "attention_mask": mask}, labels, 2))
    )


def test_the_head_is_as_it_was_even_after_an_exception(model, head):
    with pytest.raises(KeyError), labelled_tokens._head_reads(head, torch.tensor([0]), torch.tensor([0]), (1, 1)):
        raise KeyError
    assert not head._forward_pre_hooks


def test_predicted_tokens_stand_where_the_labels_do(model, head):
    """A causal model's logits stand one position before."""
    rows = random_rows()
    predicted = CAUSAL_LM.scores_per_task(model, head, rows).predicted_BL
    likeliest, labelled = model(**rows.inputs).logits.argmax(-1), rows.labels_BL != -100
    labelled[:, 0] = False  # which none predicts
    expected = torch.full_like(rows.labels_BL, -100)
    expected[:, 1:] = likeliest[:, :-1].where(labelled[:, 1:], -100)
    assert torch.equal(predicted, expected)


def test_a_task_without_labels_is_refused():
    """Its loss would be no number, its gradient 0, and its rows would count as right."""
    model, rows = tiny(), random_rows(n_tasks=2, per_task=2)
    rows.labels_BL[2:] = -100
    with pytest.raises(MetaPeftError, match="Task 1 of a stack of 2 has no label"):
        AdapterLoss(model)(dict(AdapterLoss(model).weights.parameters()), rows)
    rows.labels_BL[2:, 0] = 3  # which no token comes before
    with pytest.raises(MetaPeftError, match="Task 1 of a stack of 2 has no label"):
        AdapterLoss(model).scores(dict(AdapterLoss(model).weights.parameters()), rows)
