"""DoRA's values are PEFT's, its derivatives those of the loss. The contract of `test_architectures.py` covers it too."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, base_of, lora, plain_loss, rows_for
from peft import PeftModel
from tiny_models import assert_equal, dense_twin, fingerprint, random_batch, random_rows, with_lora

from meta_peft.algorithms import MAML
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import InnerRule
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.params import expand, gradients, leaves
from meta_peft.types import Params, Rows


def dora(kind: str) -> PeftModel:
    return lora(base_of(kind), ARCHITECTURES[kind].targets, use_dora=True).eval()


def stock_loss(model: PeftModel, rows: Rows) -> torch.Tensor:
    logits = model(**rows.inputs).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, rows.labels_BL[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "opt"])
def test_values_are_those_of_peft(kind: str):
    """Linear layers, GPT-2's transposed ones, with biases and without; as matrices of one task and as a stack of two."""
    model, rows = dora(kind), random_rows(n_tasks=1)
    loss_fn = AdapterLoss(model)
    weights = {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
    expected = stock_loss(model, rows)
    torch.testing.assert_close(loss_fn(weights, rows), expected.view(1), rtol=1e-12, atol=0)
    twice = Rows({n: t.repeat(2, 1) for n, t in rows.inputs.items()}, rows.labels_BL.repeat(2, 1), 2)
    torch.testing.assert_close(loss_fn(expand(weights, 2), twice), expected.expand(2), rtol=1e-12, atol=0)


def test_peft_alone_does_not_give_the_gradient_of_the_loss():
    """Why there is a forward of its own here. Should PEFT differentiate the norm one day, it can go."""
    model, rows = dora("llama"), rows_for(base_of("llama"), n_tasks=1)
    loss_fn = AdapterLoss(model)
    own: Params = dict(loss_fn.weights.parameters())
    of_peft, mine = gradients(stock_loss(model, rows), own), gradients(loss_fn(own, rows).sum(), own)
    fast = leaves(own)
    assert_equal(mine, gradients(plain_loss(model, fast, rows), fast), 1e-12)
    off = {n: ((of_peft[n] - g).norm() / g.norm()).item() for n, g in mine.items()}
    assert all(error < 1e-6 for n, error in off.items() if "magnitude" in n)  # there the norm is a factor
    assert min(error for n, error in off.items() if "lora_A" in n or "lora_B" in n) > 0.1


def test_quantised_base_equals_its_dequantised_twin(quantised_base):
    model = with_lora(quantised_base("nf4"), use_dora=True)
    generator = torch.Generator().manual_seed(3)
    for n, p in FastWeights(model).parameters().items():
        if "magnitude" in n:
            p.data += 0.1 * p.abs() * torch.randn(p.shape, generator=generator)
    before = fingerprint(model)
    twin = dense_twin(model, use_dora=True)
    batch, algorithm = random_batch(), MAML(InnerRule(lr=0.05, steps=2, learn_rates=True))
    quantised, dense = meta_gradient(model, batch, algorithm), meta_gradient(twin, batch, algorithm)
    assert_equal(quantised.metrics, dense.metrics, 1e-5)
    assert_equal(quantised.grads.adapter, dense.grads.adapter, 1e-4)
    assert_equal(quantised.grads.hyper, dense.grads.hyper, 1e-4)
    assert fingerprint(model) == before


def test_dora_on_8_bit_layers_breaks_in_peft_itself(quantised_base):
    """Why it is refused. Should this pass one day, the check in `preflight` can go."""
    model = with_lora(quantised_base("int8"), use_dora=True).eval()
    inputs = random_rows(n_tasks=1).inputs
    with torch.no_grad():
        model(**inputs)
    with torch.no_grad(), pytest.raises(AttributeError):
        model(**inputs)
