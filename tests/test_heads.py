"""Classification heads as fast weights: gradients of first and second order, stacks, and the quantised twin; in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import CASES, CLASSES, model_of, rows_of
from kinds import HEAD, KINDS, arguments, peft_model
from peft import PeftModel
from tiny_models import assert_equal, fingerprint, randomise
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_peft.adapters.adapter_files import load_adapter
from meta_peft.adapters.hub import write_adapter
from meta_peft.algorithms import MAML
from meta_peft.base import load_base, lora_config, with_adapter
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.linear import dequantise, quantised_layers
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.lora.fast_weights import FastWeights, is_lora
from meta_peft.outer_loop.outer_loop import LearnedRates, meta_gradient
from meta_peft.params import expand, gradients, leaves
from meta_peft.preflight import check_model
from meta_peft.types import EpisodeBatch, Params, Rows

RULE = InnerRule(lr=0.05, steps=2, learn_rates=True, rates_per_step=True)


def plain_loss(model: PeftModel, fast: Params, rows: Rows) -> Tensor:
    """One task the ordinary way: PEFT's own forward, and the cross-entropy of transformers."""
    values = {}
    for name, value in fast.items():
        if is_lora(name):
            values[name.replace(".weight", ".default.weight")] = value
        else:
            module = next(m for m in ("pre_classifier", "classifier", "score") if f".{m}." in name)
            values[name.replace(f".{module}.", f".{module}.modules_to_save.default.")] = value
    with sdpa_kernel(SDPBackend.MATH):
        logits = functional_call(model, values, (), dict(rows.inputs)).logits
    return F.cross_entropy(logits.view(-1, CLASSES), rows.labels_BL.flatten(), ignore_index=-100)


@cache
def trained(case: str) -> tuple[AdapterLoss, EpisodeBatch, LearnedRates, Any]:
    loss_fn = AdapterLoss(model_of(case).train())
    rates = LearnedRates(RULE, dict(loss_fn.weights.parameters()))
    noise = torch.randn(rates.log_rates.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rates.log_rates.data += 0.3 * noise
    batch = EpisodeBatch(rows_of(case, seed=2), rows_of(case, seed=3), ["one", "other"])
    before = fingerprint(loss_fn.model)
    gradient = meta_gradient(loss_fn, batch, MAML(RULE, memory="unrolled"), rates)
    assert fingerprint(loss_fn.model) == before
    return loss_fn, batch, rates, gradient


@pytest.mark.parametrize("case", CASES)
def test_a_stack_equals_its_tasks_one_at_a_time(case: str):
    """Each task has a head of its own; the loss and all its gradients against PEFT's own forward."""
    model = model_of(case).train()
    loss_fn, reference, rows = AdapterLoss(model), copy.deepcopy(model).eval(), rows_of(case, n_tasks=3)
    assert [n.removeprefix("base_model.model.") for n in loss_fn.weights.parameters() if not is_lora(n)] == list(
        CASES[case].head
    )
    generator = torch.Generator().manual_seed(4)
    stack = expand(dict(loss_fn.weights.parameters()), 3)
    stack = leaves({n: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in stack.items()})
    loss_T = loss_fn(stack, rows)
    grads = gradients(loss_T.sum(), stack)
    assert loss_fn._at_once
    for t in range(3):
        fast = leaves({n: p[t] for n, p in stack.items()})
        loss = plain_loss(reference, fast, rows.tasks(t, t + 1))
        assert loss_T[t].item() == pytest.approx(loss.item(), rel=1e-12)
        assert_equal({n: g[t] for n, g in grads.items()}, gradients(loss, fast), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_finite_differences(case: str):
    """Along one direction of all LoRA matrices, all weights of the head and all rates; fourth-order differences."""
    loss_fn, batch, rates, gradient = trained(case)
    start = {n: p.detach() for n, p in loss_fn.weights.parameters().items()} | {RATES: rates.log_rates.detach()}
    grads = {**gradient.grads.adapter, **gradient.grads.hyper}
    assert all(grads[n].abs().max() > 0 for n in start)
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.items()}

    def objective(h: float) -> float:
        moved = {n: p + h * direction[n] for n, p in start.items()}
        hyper = {RATES: moved.pop(RATES)}
        fast = adapt(loss_fn, moved, hyper, batch.support, RULE)
        return loss_fn.scores(fast, batch.query).loss_T.mean().item()

    h, stencil = 1e-6, {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}  # small: DistilBERT's head has a ReLU
    slope = sum(weight * objective(k * h) for k, weight in stencil.items()) / h
    assert slope == pytest.approx(sum((grads[n] * d).sum().item() for n, d in direction.items()), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_replay_is_unrolling_and_first_order_is_not(case: str):
    loss_fn, batch, rates, unrolled = trained(case)
    replay = meta_gradient(loss_fn, batch, MAML(RULE, memory="replay"), rates)
    assert all(torch.equal(g, unrolled.grads.adapter[n]) for n, g in replay.grads.adapter.items())
    first = meta_gradient(loss_fn, batch, MAML(RULE, first_order=True), rates).grads.adapter
    heads = [n for n in first if not is_lora(n)]
    exact = unrolled.grads.adapter
    assert max((first[n] - exact[n]).abs().max() / exact[n].abs().max() for n in heads) > 0.01


def test_tasks_apart_where_a_head_cannot_be_stacked():
    """A norm in a head has no stack; the results are the same."""
    model, rows = model_of("roberta"), rows_of("roberta")
    together = AdapterLoss(model)
    start = expand(dict(together.weights.parameters()), 2)
    expected = together(start, rows)
    apart = AdapterLoss(model)
    apart._at_once = False
    torch.testing.assert_close(apart(start, rows), expected, rtol=1e-12, atol=0)
    head = model.get_base_model().classifier.modules_to_save["default"]
    head.dropout = torch.nn.LayerNorm(16, dtype=torch.float64)
    normed = AdapterLoss(model)
    assert not normed._at_once
    assert any("classifier.dropout.weight" in name for name in normed.weights.parameters())
    assert normed(expand(dict(normed.weights.parameters()), 2), rows).isfinite().all()


@pytest.mark.parametrize("fast", ["weight", "bias", "lora"])
def test_some_of_a_head_is_fast(fast: str):
    """Stacked matrices with a shared bias, and the other way round."""
    loss_fn, batch, _, _ = trained("bert")
    rule = InnerRule(lr=0.05, steps=2, fast=fast)
    adapter = {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
    rates = rule.initial_rates(adapter)
    together = adapt(loss_fn, adapter, rates, batch.support, rule)
    for t in range(2):
        alone = adapt(loss_fn, adapter, rates, batch.support.tasks(t, t + 1), rule)
        assert_equal({n: p[t] for n, p in together.items()}, {n: p[0] for n, p in alone.items()}, 1e-12)
        assert [n for n in alone if not torch.equal(alone[n][0], adapter[n])] == [n for n in adapter if fast in n]


def test_classes_that_a_task_does_not_have_are_in_the_softmax():
    """What is scored is what the saved adapter answers, without a mask."""
    loss_fn, rows = AdapterLoss(model_of("bert")), rows_of("bert")
    rows.labels_BL.fill_(0)
    logits = loss_fn.model.eval()(**rows.inputs).logits
    expected = F.cross_entropy(logits, rows.labels_BL[:, 0], reduction="none").view(2, -1).mean(1)
    torch.testing.assert_close(loss_fn(dict(loss_fn.weights.parameters()), rows), expected, rtol=1e-12, atol=0)


def test_layers_below_the_adapter_run_once():
    """The head, above all layers, is no part of where the adapter begins."""
    model = model_of("bert", target_modules=["query"], layers_to_transform=[1])
    loss_fn, rows = AdapterLoss(model), rows_of("bert")
    assert loss_fn.stack(InnerRule()) == (2, 1, 0)
    values = leaves(expand(dict(loss_fn.weights.parameters()), 2))
    first = loss_fn(values, rows)
    assert torch.equal(loss_fn(values, rows), first)
    fresh = AdapterLoss(model)(values, rows_of("bert"))
    torch.testing.assert_close(fresh, first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
def test_quantised_twin(how: str):
    """A quantised encoder under a head that is whole, against the same weights dequantised."""
    model = peft_model(HEAD, **{how: True})
    assert len(quantised_layers(model)) == 13  # six in each layer, and the pooler
    head = model.get_base_model().classifier
    assert head.modules_to_save["default"].weight.dtype == torch.float32
    randomise(model)
    twin = with_adapter(load_base(arguments(HEAD)), lora_config(arguments(HEAD)))
    source = dict(model.named_modules())
    with torch.no_grad():
        for path, module in twin.named_modules():
            if path in source and quantised_layers(source[path]) == [source[path]]:
                module.weight.copy_(dequantise(source[path]))
    FastWeights(twin).load_(dict(FastWeights(model).parameters()))
    batch = EpisodeBatch(rows_of("bert", seed=2), rows_of("bert", seed=3), ["one", "other"])
    mine, theirs = (meta_gradient(m, batch, MAML(RULE)) for m in (model, twin))
    assert_equal(mine.grads.adapter, theirs.grads.adapter, 1e-3)


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
@pytest.mark.parametrize("kind", [HEAD, "token_classification"])
def test_a_head_is_whole_on_a_base_in_bfloat16(kind: str, options: dict[str, bool], tmp_path: Path):
    """Its gradients are those on the same base in float32 but for rounding on the way, and no small step is lost."""
    models = {}
    for dtype in ("bfloat16", "float32"):
        made = arguments(kind, dtype=dtype, **options)
        models[dtype] = with_adapter(load_base(made), lora_config(made))
    coarse, fine = models.values()
    check_model(coarse, second_order=True)
    heads = {name: p for name, p in FastWeights(coarse).parameters().items() if not is_lora(name)}
    assert {parameter.dtype for parameter in heads.values()} == {torch.float32}
    randomise(fine)
    FastWeights(coarse).load_(dict(FastWeights(fine).parameters()))
    case = "bert, tokens" if kind == "token_classification" else "bert"
    batch = EpisodeBatch(rows_of(case, seed=2), rows_of(case, seed=3), ["one", "other"])
    gentle = MAML(InnerRule(lr=1e-4, steps=1))
    mine, theirs = (meta_gradient(model, batch, gentle) for model in (coarse, fine))
    for name in heads:
        a, b = mine.grads.adapter[name].flatten(), theirs.grads.adapter[name].flatten()
        assert F.cosine_similarity(a, b, dim=0) > 0.98, name
    saved = dict(FastWeights(coarse).parameters())
    write_adapter({n: p.detach() for n, p in saved.items()}, coarse.peft_config["default"], "base", tmp_path)
    loaded = FastWeights(load_adapter(load_base(arguments(kind, dtype="bfloat16", **options)), tmp_path, tuple(saved)))
    assert all(torch.equal(p, saved[name]) for name, p in loaded.parameters().items()), "no digit is lost on the way"


def refused(model: PeftModel, message: str) -> None:
    with pytest.raises(MetaPeftError, match=message):
        check_model(model, second_order=True)


def test_heads_that_are_refused():
    made = arguments(HEAD)
    without = lora_config(made)
    without.task_type = without.modules_to_save = None
    refused(
        with_adapter(load_base(made), without), "is not part of the adapter.*give LoraConfig a task_type of SEQ_CLS"
    )
    coarse = with_adapter(load_base(made).bfloat16(), lora_config(made))
    refused(coarse, r"classifier.weight is in torch.bfloat16.*load the base with load_base")
    by_name = lora_config(made)
    by_name.task_type, by_name.modules_to_save = None, ["classifier"]
    refused(with_adapter(load_base(made), by_name), "so load would refuse it: give LoraConfig a task_type of SEQ_CLS")
    for options in ({"num_labels": 1}, {"problem_type": "regression"}, {"problem_type": "multi_label_classification"}):
        model = with_adapter(load_base(made), lora_config(made))
        model.get_base_model().config.update(options)
        refused(model, r"num_labels=\d and problem_type=.*expected two classes or more, of which each row has one")
    more = lora_config(made)
    more.modules_to_save.append("word_embeddings")
    refused(
        with_adapter(load_base(made), more), "modules_to_save is set, but only LoRA matrices.*classifier and score may"
    )


def test_a_base_whose_frozen_weights_would_be_random(tmp_path):
    """BERT's pooler comes before its head, and is not saved with an adapter."""
    base = load_base(arguments("masked_lm"))
    base.save_pretrained(tmp_path)
    made = copy.copy(arguments(HEAD))
    made.model_name_or_path = str(tmp_path)
    with pytest.raises(MetaPeftError, match=r"no weights for 2 parts of BertForSequenceClassification \('bert.pooler"):
        load_base(made)
    assert KINDS[HEAD].num_labels == load_base(arguments(HEAD)).config.num_labels


@pytest.mark.parametrize("kind", [name for name, how in KINDS.items() if how.objective == HEAD])
def test_a_new_head_starts_at_zero_and_learns(kind: str, tmp_path: Path):
    """In its last layer, so that what comes before it still passes a gradient on after one step."""
    model = peft_model(kind, new_head="zero")
    loss_fn = AdapterLoss(model)
    heads = {n: p for n, p in loss_fn.weights.parameters().items() if "lora_" not in n}
    zero = {n for n, p in heads.items() if not p.any()}
    last = [n for n in heads if n.endswith(("classifier.weight", "out_proj.weight", "score.weight"))][-1]
    assert last in zero
    assert any(p.any() for n, p in heads.items() if "dense" in n or "pre_classifier" in n) or len(heads) <= 2
    random = AdapterLoss(peft_model(kind)).weights.parameters()
    assert random[last].any()

    made = arguments(kind, new_head="zero")
    trained = tmp_path / "trained"  # a head that the checkpoint has stays as it is
    base = load_base(arguments(kind))
    base.save_pretrained(trained)
    again = load_base(replace(made, model_name_or_path=str(trained)))
    path = last.removeprefix("base_model.model.").removesuffix(".weight")
    assert torch.equal(again.get_submodule(path).weight, base.get_submodule(path).weight)
