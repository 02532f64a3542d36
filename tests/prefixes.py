"""Models of which lower layers need not run again: adapted in their upper layers, or with a head alone fast."""

from __future__ import annotations

import torch
from architectures import ARCHITECTURES, base_of, lora
from heads import model_of, rows_of
from kinds import peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import assert_equal, random_batch, randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

from meta_peft.algorithms import MAML
from meta_peft.frozen.prefix import layer_list
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import SGD, InnerRule
from meta_peft.types import EpisodeBatch, MetaGradient, Rows

ALGORITHM = MAML(InnerRule(lr=0.02, steps=2, learn_rates=True))
HEAD_ALONE = InnerRule(SGD(), lr=0.5, steps=3, learn_rates=True, fast="classifier|score")
PROMPT = [5, 9, 4, 11, 7]


def loss_on(kind: str, where: str) -> AdapterLoss:
    """LoRA on the layers of an encoder-decoder whose path matches `where`; in training mode, with dropout."""
    targets = rf".*{where}(.*\.)?({'|'.join(ARCHITECTURES[kind].targets)})"
    return AdapterLoss(lora(base_of(kind, layers=3), targets).train())


def loss_on_upper_layers(kind: str, *, adapted: tuple[int, ...] = (2,), names: tuple[str, ...] = ()) -> AdapterLoss:
    base = base_of(kind, layers=3)
    if base.config.is_encoder_decoder:
        return loss_on(kind, rf"decoder\.(block|layers)\.({'|'.join(map(str, adapted))})\.")
    names = names or ARCHITECTURES[kind].targets
    return AdapterLoss(lora(base, names, layers_to_transform=list(adapted)).train())


def stacks(loss_fn: AdapterLoss) -> list[list[nn.Module]]:
    """The layers of the decoder, or those of the encoder and those of the decoder."""
    base = loss_fn.model.get_base_model()
    if base.config.is_encoder_decoder:
        return [layer_list(base.get_encoder()), layer_list(base.get_decoder())]
    return [next(list(m) for m in base.modules() if isinstance(m, nn.ModuleList))]


def count_runs(loss_fn: AdapterLoss) -> list[list[int]]:
    """How often the first product of each layer really runs, from now on."""
    runs = [[0] * len(layers) for layers in stacks(loss_fn)]
    for counts, layers in zip(runs, stacks(loss_fn), strict=True):
        for i, layer in enumerate(layers):

            def count(*_, i=i, counts=counts):
                counts[i] += 1

            next(m for m in layer.modules() if isinstance(m, (LoraLayer, nn.Linear, Conv1D))).register_forward_hook(
                count
            )
    return runs


def with_head(kind: str) -> tuple[AdapterLoss, EpisodeBatch]:
    if kind == "bert":
        return AdapterLoss(model_of("bert")), EpisodeBatch(rows_of("bert"), rows_of("bert"), ["a", "b"])
    model = peft_model(kind).double()
    randomise(model)
    batch = random_batch(n_tasks=2, support=3, query=3)
    for rows in (batch.support, batch.query):
        rows.__dict__["labels_BL"] = torch.arange(6)[:, None] % 3
    return AdapterLoss(model), batch


def assert_same(found: MetaGradient, expected: MetaGradient, rtol: float = 1e-11) -> None:
    assert list(found.grads.adapter) == list(expected.grads.adapter)
    assert_equal(found.grads.adapter, expected.grads.adapter, rtol)
    assert_equal(found.grads.hyper, expected.grads.hyper, rtol)
    metrics = [{n: v for n, v in of.metrics.items() if n != "hessian_error"} for of in (found, expected)]  # rounding
    assert_equal(metrics[0], metrics[1], rtol)


def with_prompt(rows: Rows) -> Rows:
    """The same rows with the prompt in front of each."""
    before = torch.tensor(PROMPT).expand(len(rows.labels_BL), -1)
    ids = torch.cat([before, rows.inputs["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(before), rows.inputs["attention_mask"]], 1)
    labels = torch.cat([torch.full_like(before, -100), rows.labels_BL], 1)
    return Rows({"input_ids": ids, "attention_mask": mask}, labels, rows.n_tasks)
