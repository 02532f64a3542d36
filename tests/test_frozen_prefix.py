from __future__ import annotations

import gc

import pytest
import torch
from conftest import assert_equal, random_batch, random_rows, tiny_base, with_lora

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.algorithms import MAML
from meta_peft.frozen_prefix import PLAIN_STACKS, FrozenPrefix
from meta_peft.inner_optimizers import InnerRule
from meta_peft.outer_loop import meta_gradient
from meta_peft.params import expand

# Layers whose attention masks differ, where a model type has them.
OPTIONS = {
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
}


def loss_on_upper_layers(kind: str, *, layers: int = 3, adapted: tuple[int, ...] = (2,), reuse: bool = True):
    base = tiny_base(kind, layers=layers, **OPTIONS.get(kind, {}))
    model = with_lora(base, layers_to_transform=list(adapted)).train()
    loss_fn = AdapterLoss(model)
    if not reuse:
        loss_fn._prefix = FrozenPrefix(model, "a model type that is not known", list(loss_fn.weights.parameters()))
        assert not loss_fn._prefix.below
    return loss_fn


def blocks(loss_fn: AdapterLoss):
    inner = loss_fn.model.get_base_model().base_model
    return inner.h if hasattr(inner, "h") else inner.layers


def count_runs(loss_fn: AdapterLoss) -> list[int]:
    """How often the attention of each layer really runs, from now on."""
    runs = [0] * len(blocks(loss_fn))
    for i, block in enumerate(blocks(loss_fn)):

        def count(*_, i=i):
            runs[i] += 1

        (block.attn if hasattr(block, "attn") else block.self_attn).register_forward_hook(count)
    return runs


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("kind", sorted(PLAIN_STACKS))
def test_changes_no_loss_and_no_gradient(kind: str, pad: str):
    """In training mode; GPT-2 has a dropout of 0.1 in its config."""
    with_reuse, without = loss_on_upper_layers(kind), loss_on_upper_layers(kind, reuse=False)
    runs, all_runs = count_runs(with_reuse), count_runs(without)
    batch = random_batch(pad=pad)
    algorithm = MAML(InnerRule(lr=0.02, steps=2, learn_rates=True))
    mine, plain = meta_gradient(with_reuse, batch, algorithm), meta_gradient(without, batch, algorithm)
    assert_equal(mine.metrics, plain.metrics, 1e-12)
    assert_equal(mine.grads.adapter, plain.grads.adapter, 1e-12)
    assert_equal(mine.grads.hyper, plain.grads.hyper, 1e-12)
    assert runs == [2, 2, 3]  # the lower layers once for the support rows and once for the query rows
    assert all_runs == [3, 3, 3]


@pytest.mark.parametrize("adapted", [(0,), (0, 1, 2), (1, 2), (1,), (2,)])
def test_skips_the_layers_below_the_first_adapted_one(adapted: tuple[int, ...]):
    loss_fn = loss_on_upper_layers("llama", adapted=adapted)
    runs, rows = count_runs(loss_fn), random_rows()
    weights = expand({n: p.detach() for n, p in loss_fn.weights.parameters().items()}, 3)
    losses = [loss_fn(weights, rows) for _ in range(3)]
    assert runs == [1 if layer < adapted[0] else 3 for layer in range(3)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-14, atol=0)
    assert torch.equal(losses[2], losses[1])


def test_other_rows_with_the_same_content_are_not_mixed_up():
    loss_fn = loss_on_upper_layers("llama")
    weights = dict(loss_fn.weights.parameters())
    one, other = random_rows(seed=1), random_rows(seed=2)
    fresh = [loss_on_upper_layers("llama")(weights, rows) for rows in (one, other)]
    assert not torch.equal(*fresh)
    for _ in range(2):
        for rows, expected in zip((one, other), fresh, strict=True):
            torch.testing.assert_close(loss_fn(weights, rows), expected, rtol=1e-12, atol=0)


def test_what_is_remembered_goes_with_its_rows():
    loss_fn = loss_on_upper_layers("llama")
    rows = random_rows()
    loss_fn(dict(loss_fn.weights.parameters()), rows)
    known = loss_fn._prefix._entering
    assert [tuple(state.shape) for state in known.values()] == [(6, 6, 16)]
    assert not known[rows].requires_grad
    del rows
    gc.collect()
    assert len(known) == 0


def test_a_training_step_leaves_nothing_behind():
    loss_fn = loss_on_upper_layers("llama")
    meta_gradient(loss_fn, random_batch(), MAML(InnerRule(steps=1)), tasks_per_forward=2)
    gc.collect()
    assert len(loss_fn._prefix._entering) == 0


def test_evaluation_and_training_may_share_what_is_remembered():
    """Whichever comes first: one computes it without gradients and with other attention kernels."""
    loss_fn, rows = loss_on_upper_layers("llama"), random_rows()
    weights = {n: p.detach().requires_grad_() for n, p in loss_fn.weights.parameters().items()}
    scores = loss_fn.scores(weights, rows)
    loss = loss_fn(weights, rows)
    torch.testing.assert_close(loss, scores.loss_T, rtol=1e-12, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), list(weights.values())))


def test_model_types_that_are_not_known_run_all_their_layers():
    loss_fn = AdapterLoss(with_lora(tiny_base("phi3", layers=2), target_modules=["qkv_proj"], layers_to_transform=[1]))
    runs, rows = count_runs(loss_fn), random_rows()
    for _ in range(2):
        loss_fn(dict(loss_fn.weights.parameters()), rows)
    assert runs == [2, 2]
