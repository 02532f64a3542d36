from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, random_rows, tiny_base

from meta_peft.objectives.causal_lm import CAUSAL_LM
from meta_peft.types import Rows


@pytest.fixture(scope="module")
def model():
    return tiny_base().eval()


@pytest.fixture(scope="module")
def head(model):
    return model.get_output_embeddings()


@pytest.mark.parametrize("pad", ["left", "right"])
def test_logits_at_labelled_positions_only(model, head, pad: str):
    rows = random_rows(pad=pad)
    seen = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    logits, labels, row_N = CAUSAL_LM.labelled_logits(model, head, rows)
    hook.remove()
    everything = model(**rows.inputs).logits
    expected = [
        (everything[b, p - 1], rows.labels_BL[b, p].item(), b)
        for b in range(6)
        for p in range(1, 6)
        if rows.labels_BL[b, p] != -100
    ]
    assert seen == [(1, len(expected), VOCAB)]  # the head computed nothing else
    torch.testing.assert_close(logits, torch.stack([e[0] for e in expected]), rtol=1e-12, atol=1e-14)
    assert labels.tolist() == [e[1] for e in expected]
    assert row_N.tolist() == [e[2] for e in expected]


def test_padding_does_not_matter(model, head):
    rows = random_rows(n_tasks=1, per_task=3)
    longer = Rows(
        {n: F.pad(t, (0, 3), value=2 if n == "input_ids" else 0) for n, t in rows.inputs.items()},
        F.pad(rows.labels_BL, (0, 3), value=-100),
        1,
    )
    torch.testing.assert_close(
        CAUSAL_LM.loss_per_task(model, head, longer), CAUSAL_LM.loss_per_task(model, head, rows), rtol=1e-12, atol=0
    )
