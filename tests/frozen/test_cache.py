"""What the layers below the adapter return, kept row by row: the same results, from fewer runs of these layers."""

from __future__ import annotations

import logging

import pytest
import torch
from architectures import base_of, batch_for
from kinds import peft_model
from prefixes import ALGORITHM, HEAD_ALONE, count_runs, loss_on_upper_layers, with_head
from tiny_models import assert_equal, random_batch, random_rows, randomise, tiny

from meta_peft.algorithms import MAML
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.cache import FrozenCache
from meta_peft.frozen.prefix import DECODERS, ENCODERS, MIXTURES_OF_EXPERTS
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.params import expand
from meta_peft.types import EpisodeBatch, Rows
from meta_peft.utils import say_once


def keeping(loss_fn: AdapterLoss, n_bytes: float = 1e9) -> tuple[AdapterLoss, FrozenCache]:
    cache = FrozenCache(n_bytes)
    loss_fn.keep_frozen(cache)
    return loss_fn, cache


def mixed(batch: EpisodeBatch) -> EpisodeBatch:
    """The same rows in other company: query rows are support rows and the other way round, tasks in another order."""
    order = torch.arange(batch.n_tasks).flip(0)
    return EpisodeBatch(batch.query.in_order(order), batch.support.in_order(order), batch.tasks[::-1])


@pytest.mark.parametrize("kind", sorted({*DECODERS, *ENCODERS, *MIXTURES_OF_EXPERTS}))
def test_the_same_meta_gradients_and_each_row_once(kind: str):
    (mine, cache), plain = keeping(loss_on_upper_layers(kind)), loss_on_upper_layers(kind)
    runs, batch = count_runs(mine), batch_for(mine.model.get_base_model(), pad="right")
    for of in (batch, mixed(batch), batch):
        found, expected = meta_gradient(mine, of, ALGORITHM), meta_gradient(plain, of, ALGORITHM)
        assert_equal(found.metrics, expected.metrics, 1e-11)
        assert_equal(found.grads.adapter, expected.grads.adapter, 1e-11)
        assert_equal(found.grads.hyper, expected.grads.hyper, 1e-11)
    assert runs == [[2, 2, 9]]  # support and query of the first batch; then never again
    assert len(cache) == len({tuple(r[m.bool()].tolist()) for r, m in all_rows(batch)})


def all_rows(batch: EpisodeBatch):
    for rows in (batch.support, batch.query):
        yield from zip(rows.inputs["input_ids"], rows.inputs["attention_mask"], strict=True)


def test_only_new_rows_run():
    loss_fn, cache = keeping(loss_on_upper_layers("llama"))
    seen, weights = [], dict(loss_fn.weights.parameters())
    lower = loss_fn._prefix.modules()[0]
    lower.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    first, second = random_rows(2, seed=1), random_rows(2, seed=2)
    loss_fn(weights, first)
    both = {name: torch.cat([first.inputs[name], second.inputs[name]]) for name in first.inputs}
    rows = Rows(both, torch.cat([first.labels_BL, second.labels_BL]), 4)
    loss = loss_fn(weights, rows)
    assert seen == [4, 4]
    assert len(cache) == 8
    torch.testing.assert_close(loss, loss_on_upper_layers("llama")(weights, rows), rtol=1e-12, atol=0)


def test_new_rows_run_with_others_of_their_length():
    """A few long rows among many short ones are no reason to pad all of them."""
    length_B = torch.randperm(40, generator=torch.Generator().manual_seed(0)) + 1
    mask_BL = (torch.arange(40) < length_B[:, None]).long()
    ids_BL = mask_BL * torch.arange(1, 1601).reshape(40, 40)
    shapes = []

    def run(some: Rows) -> torch.Tensor:
        shapes.append(tuple(some.inputs["input_ids"].shape))
        return 2.0 * some.inputs["input_ids"][:, :, None]

    rows = Rows({"input_ids": ids_BL, "attention_mask": mask_BL}, torch.zeros(40, 1), 4)
    assert torch.equal(FrozenCache(1e9).of(rows, 1, run)[:, :, 0], 2.0 * ids_BL)
    assert shapes == [(16, 16), (16, 32), (8, 40)]


def test_rows_that_are_padded_beyond_the_longest():
    """As those of a part of a stack are, if the longest row is in another part."""
    (mine, _), plain = keeping(loss_on_upper_layers("llama")), loss_on_upper_layers("llama")
    rows, weights = random_rows(3), dict(mine.weights.parameters())
    longer = {name: torch.nn.functional.pad(t, (0, 3)) for name, t in rows.inputs.items()}
    padded = Rows(longer, torch.nn.functional.pad(rows.labels_BL, (0, 3), value=-100), 3)
    for of in (padded, padded.tasks(1, 3), rows):
        found = mine.scores(weights, of)
        torch.testing.assert_close(found.loss_T, plain.scores(weights, of).loss_T, rtol=1e-12, atol=0)
        torch.testing.assert_close(mine(weights, of), found.loss_T, rtol=1e-12, atol=0)
    model = peft_model("head of a decoder", lora_layers=[1]).double()
    randomise(model)
    plain, mine = AdapterLoss(model), keeping(AdapterLoss(model))[0]
    longer["input_ids"] = longer["input_ids"].where(longer["attention_mask"].bool(), model.config.pad_token_id)
    weights, padded = dict(mine.weights.parameters()), Rows(longer, torch.arange(6)[:, None] % 3, 3)
    for of in (padded, padded.tasks(1, 3)):
        torch.testing.assert_close(mine(weights, of), plain(weights, of), rtol=1e-12, atol=0)


def test_one_cache_for_training_and_evaluation_and_for_other_adapters():
    cache, rows = FrozenCache(1e9), random_rows()
    first, second = loss_on_upper_layers("llama"), loss_on_upper_layers("llama", adapted=(1, 2))
    for loss_fn in (first, second):
        loss_fn.keep_frozen(cache)
        runs = count_runs(loss_fn)
        weights = {name: 2 * p.detach() for name, p in loss_fn.weights.parameters().items()}
        loss = loss_fn(expand(weights, 3), rows)
        torch.testing.assert_close(loss, loss_fn.scores(weights, random_rows()).loss_T, rtol=1e-12, atol=0)
        assert runs[0][0] == 1
    assert len(cache) == 2 * 6  # below layer 2, and below layer 1


def test_padding_in_front_is_not_kept():
    """Positions of such a row may depend on how much of it there is."""
    loss_fn, cache = keeping(loss_on_upper_layers("gpt2"))
    batch = batch_for(loss_fn.model.get_base_model(), pad="left")
    found = meta_gradient(loss_fn, batch, ALGORITHM)
    assert_equal(
        found.grads.adapter, meta_gradient(loss_on_upper_layers("gpt2"), batch, ALGORITHM).grads.adapter, 1e-12
    )
    assert len(cache) < 2 * len(batch.support.labels_BL)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_encoder_decoders_run_as_without(kind: str):
    loss_fn, cache = keeping(loss_on_upper_layers(kind))
    batch = batch_for(base_of(kind, layers=3))
    expected = meta_gradient(loss_on_upper_layers(kind), batch, ALGORITHM)
    assert_equal(meta_gradient(loss_fn, batch, ALGORITHM).grads.adapter, expected.grads.adapter, 1e-12)
    assert len(cache) == 0


def test_a_full_cache_keeps_what_it_has(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "meta_peft")
    per_token = 16 * 8
    loss_fn, cache = keeping(loss_on_upper_layers("llama"), n_bytes=10 * per_token)
    weights, plain = dict(loss_fn.weights.parameters()), loss_on_upper_layers("llama")
    for seed in (0, 1, 0):
        rows = random_rows(seed=seed)
        torch.testing.assert_close(loss_fn(weights, rows), plain(weights, rows), rtol=1e-12, atol=0)
    assert 1 <= len(cache) <= 10
    assert sum(t.nbytes for t in cache._known.values()) <= 10 * per_token
    assert caplog.text.count("The frozen cache is full") == 1


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
def test_on_a_quantised_base_under_a_head(how: str):
    """All layers below the last are frozen, the adapter's matrices are slow weights, and the head is fast."""

    def made() -> AdapterLoss:
        model = peft_model("head of a decoder", **{how: True}, lora_layers=[1])
        randomise(model)
        return AdapterLoss(model)

    _, batch = with_head("head of a decoder")
    (mine, cache), plain = keeping(made()), made()
    for of in (batch, mixed(batch)):
        found, expected = meta_gradient(mine, of, MAML(HEAD_ALONE)), meta_gradient(plain, of, MAML(HEAD_ALONE))
        assert_equal(found.grads.adapter, expected.grads.adapter, 1e-4)
        assert_equal(found.grads.hyper, expected.grads.hyper, 1e-4)
    assert len(cache) == 12


def test_where_nothing_lies_below(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(say_once, "_said", set())
    caplog.set_level(logging.INFO, "meta_peft")
    loss_fn, cache = keeping(AdapterLoss(tiny()))
    loss_fn(dict(loss_fn.weights.parameters()), random_rows())
    assert len(cache) == 0
    assert "keeps nothing here" in caplog.text


def test_a_base_that_is_elsewhere_is_refused(tmp_path):
    from accelerate import cpu_offload

    loss_fn = loss_on_upper_layers("llama")
    cpu_offload(loss_fn.model.get_base_model())
    with pytest.raises(MetaPeftError, match=r"in shards,.*Leave frozen_cache_gb out"):
        loss_fn.keep_frozen(FrozenCache(1))


def test_memory_is_not_held_for_padding():
    loss_fn, cache = keeping(loss_on_upper_layers("llama"))
    batch = random_batch(n_tasks=2)
    meta_gradient(loss_fn, batch, ALGORITHM)
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in cache._known.values())


def test_rows_with_token_types_are_not_taken_for_longer_ones_without():
    """The same numbers in a row, as the ids of two tokens and as the id and the type of one."""
    ids, types = torch.tensor([[5, 0]]), torch.tensor([[0]])
    without = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, 1)
    one = ids[:, :1]
    with_types = Rows({"input_ids": one, "attention_mask": torch.ones_like(one), "token_type_ids": types}, one, 1)
    cache = FrozenCache(1e9)
    for rows, value in ((without, 1.0), (with_types, 2.0)):
        found = cache.of(rows, 1, lambda some, value=value: torch.full((*some.inputs["input_ids"].shape, 3), value))
        assert found is not None
        assert found.unique().tolist() == [value]
