from __future__ import annotations

import gc

import pytest
import torch
from architectures import SIZES, lora
from tiny_models import VOCAB, random_rows
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.task_rows import RowsRearrangedError, TasksApart, rows_in_place
from meta_peft.types import Rows


@pytest.mark.parametrize("shape", [(24, 2), (4, 6, 2), (6, 4, 1, 2), (6, 4)])
def test_rows_that_do_not_arrive_as_they_went_in(shape: tuple[int, ...]):
    """Six rows of four tokens: flattened, transposed, split, or not embedded yet."""
    layer = nn.Identity()
    shown = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    with (
        rows_in_place([("a.layer", layer)], 6),
        pytest.raises(RowsRearrangedError, match=rf"a\.layer gets activations of shape {shown} instead of \[6 rows"),
    ):
        layer(torch.zeros(shape))
    assert not layer._forward_pre_hooks


def test_rows_that_do():
    layers = [("a", nn.Identity()), ("b", nn.Identity())]
    with rows_in_place(layers, 6):
        for _, layer in layers:
            for tokens in (1, 4):
                layer(torch.zeros(6, tokens, 2))
    assert not any(layer._forward_pre_hooks for _, layer in layers)


def test_as_many_tokens_as_rows_are_trusted_only_in_a_layer_that_is_known():
    """Of ``[rows, tokens, features]`` and ``[tokens, rows, features]`` nothing tells one from the other."""
    layers, known = [("known", nn.Identity()), ("other", nn.Identity())], {"known"}
    with rows_in_place(layers, 6, in_order=known):
        layers[0][1](torch.zeros(6, 6, 2))
        with pytest.raises(
            RowsRearrangedError, match=r"other gets .* \[6, 6, 2\], which does not show whether rows or"
        ):
            layers[1][1](torch.zeros(6, 6, 2))
        layers[1][1](torch.zeros(6, 4, 2))
    assert known == {"known", "other"}
    with rows_in_place(layers, 6, in_order=known):
        layers[1][1](torch.zeros(6, 6, 2))


def test_a_vector_of_each_row_shows_no_order_of_tokens():
    layer, known = nn.Identity(), set()
    with rows_in_place([("pooler", layer)], 6, frozenset({"pooler"}), known):
        layer(torch.zeros(6, 6))
    assert not known


def test_an_architecture_that_transposes_where_tokens_are_as_many_as_rows():
    """Longformer, whose attention has tokens first: each token met the weights of a task, and no row did."""
    sizes = {"attention_window": 4, "num_hidden_layers": 1, "initializer_range": 0.3, "pad_token_id": 2}
    config = AutoConfig.for_model("longformer", vocab_size=VOCAB, **{**SIZES, **sizes})
    torch.manual_seed(0)
    base = AutoModelForMaskedLM.from_config(config, dtype=torch.float64)
    loss_fn = AdapterLoss(lora(base, ("query", "value")))
    ids = random_rows(2, 4, length=8).inputs["input_ids"]
    rows = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, 2)
    stack = {name: torch.stack([weight, 3 * weight]) for name, weight in loss_fn.own().items()}
    alone = [loss_fn({name: both[t] for name, both in stack.items()}, rows.tasks(t, t + 1)).item() for t in range(2)]
    assert loss_fn(stack, rows).tolist() == pytest.approx(alone, rel=1e-12)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


def test_the_rows_of_each_task_are_the_same_objects_at_every_call():
    apart, rows = TasksApart(), random_rows(n_tasks=3)
    parts = apart.of(rows)
    assert [part.n_tasks for part in parts] == [1, 1, 1]
    for t, part in enumerate(parts):
        assert torch.equal(part.labels_BL, rows.tasks(t, t + 1).labels_BL)
    assert all(one is again for one, again in zip(parts, apart.of(rows), strict=True))
    assert apart.of(random_rows(n_tasks=3))[0] is not parts[0]


def test_one_task_is_itself():
    rows = random_rows(n_tasks=1)
    assert TasksApart().of(rows) == [rows]


def test_parts_go_with_their_rows():
    apart, rows = TasksApart(), random_rows()
    apart.of(rows)
    assert len(apart._parts) == 1
    del rows
    gc.collect()
    assert len(apart._parts) == 0
