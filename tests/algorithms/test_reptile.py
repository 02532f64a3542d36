from __future__ import annotations

import pytest
import torch
from tiny_models import assert_equal, random_batch, tiny
from torch import Tensor

from meta_peft.algorithms import MultiTask, Reptile
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import InnerRule
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.types import EpisodeBatch, Meta, Params, Rows


def test_with_one_sgd_step_it_is_the_rate_times_the_gradient():
    loss_fn, batch = AdapterLoss(tiny(), second_order=False), random_batch()
    reptile = meta_gradient(loss_fn, batch, Reptile(InnerRule(lr=0.03, steps=1)))
    gradient = meta_gradient(loss_fn, batch, MultiTask())
    assert_equal(reptile.grads.adapter, {n: 0.03 * g for n, g in gradient.grads.adapter.items()}, 1e-12)
    assert_equal({"loss": reptile.metrics["loss"]}, gradient.metrics, 1e-12)
    assert reptile.grads.hyper == {}


@pytest.mark.parametrize("steps", [1, 4])
def test_closed_form_on_a_quadratic(steps: int):
    """Support and query rows are one loss: the quadratic around the mean of their centres."""

    def loss_fn(adapter: Params, rows: Rows) -> Tensor:
        return ((adapter["w"] - rows.inputs["centre"]) ** 2).sum((1, 2)) / 2

    def rows(seed: int) -> Rows:
        centre = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Rows({"centre": centre}, torch.zeros(3, 1), 3)

    batch, rule = EpisodeBatch(rows(1), rows(2), list("abc")), InnerRule(lr=0.1, steps=steps)
    adapter = {"w": torch.randn(2, 2, dtype=torch.float64)}
    result = Reptile(rule)(loss_fn, Meta(adapter, rule.initial_rates(adapter)), batch)
    centre = (batch.support.inputs["centre"] + batch.query.inputs["centre"]) / 2
    moved = (1 - (1 - 0.1) ** steps) * (adapter["w"] - centre)
    assert_equal(result.grads.adapter, {"w": moved.mean(0)}, 1e-12)


def test_rate_zero_moves_nothing():
    result = meta_gradient(tiny(), random_batch(), Reptile(InnerRule(lr=0, steps=2)))
    assert all((g == 0).all() for g in result.grads.adapter.values())


def test_no_steps_is_an_error():
    with pytest.raises(MetaPeftError, match="inner_steps must be 1 or more"):
        Reptile(InnerRule(steps=0))


def test_rates_cannot_be_learned():
    with pytest.raises(MetaPeftError, match="no gradient for the inner rates"):
        Reptile(InnerRule(learn_rates=True))


def test_slow_weights_cannot_be_left_out():
    with pytest.raises(MetaPeftError, match="no gradient for slow weights: leave fast_weights out"):
        Reptile(InnerRule(fast="lora_B"))
