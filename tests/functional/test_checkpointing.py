from __future__ import annotations

import gc
import weakref

import pytest
import torch
from architectures import ARCHITECTURES, base_of, batch_for, lora
from tiny_models import assert_equal, random_batch, random_rows, tiny, tiny_base, with_lora
from torch.autograd.graph import saved_tensors_hooks

from meta_peft.algorithms import MAML
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.hessian import GradientGraph
from meta_peft.inner_loop.inner_loop import start
from meta_peft.inner_optimizers import Adam, InnerRule
from meta_peft.outer_loop.outer_loop import meta_gradient

RULE = InnerRule(Adam(eps_root=1e-2), lr=0.02, steps=2, learn_rates=True)


@pytest.mark.parametrize("memory", ["unrolled", "replay", 1, "finite_differences"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "nf4", "int8"])
def test_gives_the_same_meta_gradient_to_the_last_bit(model_of, name: str, memory: str | int):
    model, batch, algorithm = model_of(name), random_batch(), MAML(RULE, memory=memory)
    kept = meta_gradient(AdapterLoss(model), batch, algorithm)
    again = meta_gradient(AdapterLoss(model, checkpoint=True), batch, algorithm)
    assert_equal(again.metrics, kept.metrics, 0)
    assert_equal(again.grads.adapter, kept.grads.adapter, 0)
    assert_equal(again.grads.hyper, kept.grads.hyper, 0)


def test_with_lora_on_upper_layers_too():
    """Where the layers below are run once, and the last one only at labelled positions."""
    model = with_lora(tiny_base(layers=4), layers_to_transform=[2, 3])
    assert AdapterLoss(model).stack(InnerRule()) == (4, 2, 0)
    batch, algorithm = random_batch(), MAML(RULE, memory="replay")
    kept = meta_gradient(AdapterLoss(model), batch, algorithm)
    again = meta_gradient(AdapterLoss(model, checkpoint=True), batch, algorithm)
    assert_equal(again.grads.adapter, kept.grads.adapter, 0)


@pytest.mark.parametrize("kind", ["bert", "t5", "whisper", "mixtral", "opt"])
def test_every_layer_of_other_architectures_is_computed_again(kind: str):
    model = lora(base_of(kind), ARCHITECTURES[kind].targets)
    batch, algorithm = batch_for(model.get_base_model()), MAML(RULE, memory="replay")
    kept, again = (
        meta_gradient(AdapterLoss(model, checkpoint=checkpoint), batch, algorithm) for checkpoint in (False, True)
    )
    assert_equal(again.grads.adapter, kept.grads.adapter, 0)
    assert AdapterLoss(model).stack(InnerRule()).all == (4 if kind in ("t5", "whisper") else 2)


@pytest.mark.parametrize("second_order", [False, True])
def test_keeps_less(second_order: bool):
    model = tiny(layers=6)
    sizes = {}
    for checkpoint in (False, True):
        loss_fn = AdapterLoss(model, checkpoint=checkpoint)
        sizes[checkpoint] = _saved_bytes(loss_fn, second_order)
    assert sizes[True] < (0.8 if second_order else 0.4) * sizes[False]


def _saved_bytes(loss_fn: AdapterLoss, second_order: bool) -> int:
    """Bytes of the tensors that autograd holds on to."""
    alive: dict[int, tuple[weakref.ref, int]] = {}

    def note(tensor):
        alive[id(tensor)] = (weakref.ref(tensor), tensor.untyped_storage().nbytes())
        return tensor

    rows = random_rows()
    fast, slow = start(dict(loss_fn.weights.parameters()), RULE, rows.n_tasks)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        if second_order:
            graph = GradientGraph(loss_fn, fast, slow, rows)
        else:
            graph = loss_fn({n: p.clone().requires_grad_() for n, p in fast.items()}, rows)
    gc.collect()
    total = sum(size for reference, size in alive.values() if reference() is not None)
    del graph
    return total


def test_without_gradients_nothing_is_wrapped():
    loss_fn, rows = AdapterLoss(tiny(), checkpoint=True), random_rows()
    own = dict(loss_fn.weights.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loss_fn(own, rows), AdapterLoss(tiny())(own, rows), rtol=0, atol=0)
