from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import fingerprint, tiny_base, with_lora
from torch import nn

from meta_peft.lora.fast_weights import FastWeights
from meta_peft.run_tasks.base_view import BaseView
from meta_peft.tasks.collate import EpisodeCollator

COLLATE = EpisodeCollator(2)


def rows(n: int = 7, prompt: int = 3) -> list[dict]:
    """Of different lengths, so that padding would show."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        ids = rng.integers(3, 40, prompt + 1 + i % 4).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest):
    return with_lora(tiny_base(request.param, layers=2))


@pytest.fixture(scope="module")
def plain(model):
    """The same base, without any adapter, in evaluation mode."""
    return tiny_base(model.get_base_model().config.model_type, layers=2).eval()


def test_vectors_are_means_of_the_bases_last_states_over_the_prompt(model, plain):
    found = BaseView(model, COLLATE, rows_per_forward=3).vectors(rows())
    with torch.no_grad():
        for vector, row in zip(found, rows(), strict=True):
            ids = torch.tensor([row["input_ids"]])
            states = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            np.testing.assert_allclose(vector, states[:3].mean(0).numpy(), rtol=1e-5, atol=1e-6)


def test_a_row_without_a_prompt_is_all_answer(model, plain):
    (row,) = rows(1, prompt=4)
    found = BaseView(model, COLLATE).vectors([{**row, "labels": row["input_ids"]}])
    with torch.no_grad():
        states = plain(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(found[0], states.mean(0).numpy(), rtol=1e-5, atol=1e-6)


def test_uncertainty_is_the_loss_of_the_base_or_its_entropy(model, plain):
    losses = BaseView(model, COLLATE, rows_per_forward=3).uncertainty(rows())
    entropies = BaseView(model, COLLATE, labelled=False).uncertainty(
        [{name: values[:4] for name, values in row.items()} for row in rows()]
    )
    with torch.no_grad():
        for loss, entropy, row in zip(losses, entropies, rows(), strict=True):
            ids = torch.tensor([row["input_ids"]])
            logits = plain(input_ids=ids).logits[0]
            assert loss == pytest.approx(float(F.cross_entropy(logits[2:-1], ids[0, 3:])), rel=1e-5)
            p = logits[2].softmax(-1)
            assert entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)


def test_the_model_is_as_it_was(model):
    model.train()
    parameters = dict(model.named_parameters())
    list(parameters.values())[-1].requires_grad_(True)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in parameters.items()}
    prints = fingerprint(model)
    BaseView(model, COLLATE).vectors(rows())
    BaseView(model, COLLATE).uncertainty(rows())
    assert all(module.training for module in model.modules() if isinstance(module, nn.Module))
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0], name
        assert torch.equal(p, before[name][1]), name
    assert fingerprint(model) == prints
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    with torch.no_grad(), model.disable_adapter():
        alone = model(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, alone)  # the adapter is on again
    assert FastWeights(model).adapter == "default"
