"""Products at the positions of tokens alone: the same losses and meta-gradients, and no other positions left out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, base_of, lora
from prefixes import assert_same
from tiny_models import QUANTISED, random_rows, tiny_base, with_lora
from torch import Tensor

from meta_peft.algorithms import MAML
from meta_peft.frozen import linear as frozen_linear
from meta_peft.frozen.prefix import ONE_INPUT
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.padding import TokenPositions
from meta_peft.inner_optimizers import InnerRule
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.types import EpisodeBatch, Rows

RULE = InnerRule(lr=0.02, steps=2, learn_rates=True)


def ragged_rows(seed: int = 0) -> Rows:
    """Three tasks' rows of two to six tokens, all but the first of which is to be predicted."""
    ids_BL = random_rows(seed=seed).inputs["input_ids"].clone()
    length_B = torch.tensor([6, 2, 3, 5, 2, 3]).roll(seed)
    mask_BL = (torch.arange(6) < length_B[:, None]).long()
    labels_BL = ids_BL.where(mask_BL.bool() & (torch.arange(6) > 0), -100)
    return Rows({"input_ids": ids_BL.where(mask_BL.bool(), 2), "attention_mask": mask_BL}, labels_BL, 3)


def ragged_batch() -> EpisodeBatch:
    return EpisodeBatch(ragged_rows(), ragged_rows(1), ["a", "b", "c"])


def everywhere(loss_fn: AdapterLoss) -> AdapterLoss:
    loss_fn._positions.noted = lambda model: nullcontext()  # type: ignore[method-assign]
    return loss_fn


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each product with a frozen weight, how many rows it was given and how many it was computed at."""
    seen: list[tuple[int, int]] = []
    times = frozen_linear.times_frozen

    def noting(x: Tensor, layer: Any, *, transposed: bool = False, at: Tensor | None = None) -> Tensor:
        given = x.numel() // x.shape[-1]
        seen.append((given, given if at is None else len(at)))
        return times(x, layer, transposed=transposed, at=at)

    monkeypatch.setattr("meta_peft.frozen.linear.times_frozen", noting)
    monkeypatch.setattr("meta_peft.ops.lora_linear.times_frozen", noting)
    return seen


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", sorted(ONE_INPUT))
def test_the_same_meta_gradient_of_every_architecture(kind: str, checkpoint: bool):
    def made() -> AdapterLoss:
        return AdapterLoss(lora(base_of(kind), ARCHITECTURES[kind].targets).train(), checkpoint=checkpoint)

    batch = ragged_batch()
    found = meta_gradient(made(), batch, MAML(RULE))
    assert_same(found, meta_gradient(everywhere(made()), batch, MAML(RULE)))


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_same_on_a_quantised_base(quantised_base, kind: str, products: list[tuple[int, int]]):
    model = with_lora(quantised_base(kind), target_modules=["q_proj", "v_proj"])
    batch = ragged_batch()
    found = meta_gradient(AdapterLoss(model), batch, MAML(RULE))
    assert (30, 20) in products
    assert sum(n for _, n in products) < 0.7 * sum(given for given, _ in products)
    assert_same(found, meta_gradient(everywhere(AdapterLoss(model)), batch, MAML(RULE)), 1e-4)  # float32


@pytest.mark.parametrize(("n_labels", "n_products"), [(5, 14), (1, 11)])
def test_every_product_of_a_forward_is_at_the_tokens(products: list[tuple[int, int]], n_labels: int, n_products: int):
    """Behind its attention the last layer runs where something is to be predicted, which may be as many positions; its
    three products are transformers' own where they are not."""
    model = with_lora(tiny_base("llama", layers=2), target_modules=["q_proj"])
    rows = ragged_rows()
    last_L = torch.arange(6) >= rows.inputs["attention_mask"].sum(1, keepdim=True) - n_labels
    rows = Rows(rows.inputs, rows.labels_BL.where(last_L, -100), 3)
    loss_fn = AdapterLoss(model)
    loss_fn(loss_fn.own(), rows)
    assert products == [(30, 20)] * n_products


def test_the_same_scores_and_answers_of_a_decoder():
    model = with_lora(tiny_base("llama", layers=2))
    rows = ragged_rows()
    some, all_ = AdapterLoss(model), everywhere(AdapterLoss(model))
    for mine, expected in zip(some.scores(some.own(), rows), all_.scores(all_.own(), rows), strict=True):
        torch.testing.assert_close(mine, expected)

    def written(model: Any, rows: Rows) -> Tensor:
        return model.generate(**rows.inputs, max_new_tokens=4, do_sample=False, pad_token_id=2)

    left = random_rows(pad="left")
    assert torch.equal(*(torch.cat(f.with_model(written, f.own(), left)) for f in (some, all_)))


class Noted:
    """What `TokenPositions` gives for some activations after a forward with a mask."""

    def __init__(self) -> None:
        self.positions = TokenPositions()

    def __call__(self, mask: Any, shape: tuple[int, ...]) -> Any:
        model = torch.nn.Identity()
        with self.positions.noted(model):
            model.forward = lambda **_: self.positions(torch.zeros(shape))  # type: ignore[method-assign]
            found = model(attention_mask=mask)
        assert self.positions(torch.zeros(shape)) is None, "outside"
        return None if found is None else found.tolist()


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_positions():
    noted = Noted()
    assert noted(MASK, (2, 3, 5)) == [0, 1, 3]
    assert noted(MASK.float(), (2, 3, 5)) == [0, 1, 3]
    for shape in ((2, 2, 5), (3, 2, 5), (6, 5), (1, 2, 3, 5)):
        assert noted(MASK, shape) is None
    for mask in (None, MASK.flip(1), torch.ones(2, 3), torch.ones(2, 1, 3, 3), {"full": MASK}, MASK.to("meta")):
        assert noted(mask, (2, 3, 5)) is None


def test_a_forward_without_a_mask_after_one_with_a_mask():
    positions, model = TokenPositions(), torch.nn.Identity()
    model.forward = lambda **_: None  # type: ignore[method-assign]
    with positions.noted(model):
        model(attention_mask=MASK)
        assert positions(torch.zeros(2, 3, 1)) is not None
        model()
        assert positions(torch.zeros(2, 3, 1)) is None
