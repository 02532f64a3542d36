from __future__ import annotations

import torch
from tiny_models import assert_equal, plain_loss, random_batch, reference_model, tiny

from meta_peft.algorithms import MultiTask
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.params import gradients, leaves


def test_is_the_gradient_of_the_mean_loss_on_all_rows():
    model, batch = tiny(), random_batch(support=2, query=3)
    result = meta_gradient(model, batch, MultiTask())
    adapter, reference = leaves(dict(FastWeights(model).parameters())), reference_model(model)
    per_task = [
        sum(plain_loss(reference, adapter, rows.tasks(t, t + 1)) for rows in (batch.support, batch.query)) / 2
        for t in range(3)
    ]
    assert_equal(result.grads.adapter, gradients(sum(per_task) / 3, adapter), 1e-12)
    assert_equal(result.metrics, {"loss": torch.stack(per_task).detach()}, 1e-12)
    assert result.grads.hyper == {}
