from __future__ import annotations

import logging

import pytest
import torch
from architectures import ARCHITECTURES, base_of, lora, rows_for
from peft import LoraConfig
from tiny_models import (
    QUANTISED,
    assert_equal,
    dense_twin,
    enable_checkpointing,
    plain_loss,
    random_rows,
    reference_model,
    tiny,
    tiny_base,
    tolerance,
    with_lora,
)

from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.params import expand, gradients, leaves
from meta_peft.types import Rows
from meta_peft.utils import say_once

MODELS = ["llama", "gpt2", "float32", "nf4", "int8"]


def stack_of(loss_fn: AdapterLoss, n_tasks: int = 3):
    """A start of its own for each task."""
    generator = torch.Generator().manual_seed(4)
    stack = expand(dict(loss_fn.weights.parameters()), n_tasks)
    return leaves({n: p + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in stack.items()})


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_stack_equals_peft_one_task_at_a_time(model_of, name: str, pad: str):
    """Loss and gradient; in training mode, so that a dropout or an 8-bit path left on would show."""
    model = model_of(name).train()
    loss_fn, reference, rows = AdapterLoss(model), reference_model(model), random_rows(pad=pad)
    stack = stack_of(loss_fn)
    loss_T = loss_fn(stack, rows)
    grads = gradients(loss_T.sum(), stack)
    assert loss_T.shape == (3,)
    for t in range(3):
        fast = leaves({n: p[t] for n, p in stack.items()})
        loss = plain_loss(reference, fast, rows.tasks(t, t + 1))
        assert loss_T[t].item() == pytest.approx(loss.item(), rel=tolerance(name))
        assert_equal({n: g[t] for n, g in grads.items()}, gradients(loss, fast), tolerance(name))


def test_loss_is_that_of_transformers_with_labels():
    model = tiny().eval()
    loss_fn, rows = AdapterLoss(model), random_rows(n_tasks=1, per_task=4)
    weights = dict(loss_fn.weights.parameters())
    # transformers rounds the logits to float32
    expected = model(**rows.inputs, labels=rows.labels_BL).loss.item()
    assert loss_fn(weights, rows).item() == pytest.approx(expected, rel=1e-6)


def test_matrices_without_a_task_dimension_serve_all_tasks():
    loss_fn, rows = AdapterLoss(tiny()), random_rows()
    weights = dict(loss_fn.weights.parameters())
    torch.testing.assert_close(loss_fn(weights, rows), loss_fn(expand(weights, 3), rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_same_at_every_call_and_in_every_mode(model_of, name: str):
    model = model_of(name)
    loss_fn, rows = AdapterLoss(model), random_rows()
    weights = dict(loss_fn.weights.parameters())
    losses = []
    for mode in (True, False, True):
        model.train(mode)
        losses += [loss_fn(weights, rows).detach(), loss_fn.scores(weights, rows).loss_T]
        assert model.training is mode
        assert all(m.training is mode for m in model.modules())
    assert all(torch.allclose(loss, losses[0], rtol=1e-5, atol=0) for loss in losses[1:])


def test_each_module_keeps_its_own_mode():
    model = tiny("gpt2").train()
    model.get_base_model().transformer.h[0].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    loss_fn = AdapterLoss(model)
    loss_fn(dict(loss_fn.weights.parameters()), random_rows())
    assert {n: m.training for n, m in model.named_modules()} == modes


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_base_equals_its_dequantised_twin(model_of, name: str):
    model = model_of(name).train()
    quantised, dense, rows = AdapterLoss(model), AdapterLoss(dense_twin(model)), random_rows()
    stack = stack_of(quantised)
    torch.testing.assert_close(quantised(stack, rows), dense(stack, rows), rtol=1e-5, atol=0)
    assert_equal(
        gradients(quantised(stack, rows).sum(), stack), gradients(dense(stack, rows).sum(), stack), tolerance(name)
    )


def test_fused_attention_where_one_derivative_is_enough():
    model, rows = tiny(), random_rows()
    first, second = AdapterLoss(model, second_order=False), AdapterLoss(model)
    stack = stack_of(first)
    assert_equal(gradients(first(stack, rows).sum(), stack), gradients(second(stack, rows).sum(), stack), 1e-12)
    loss = gradients(second(stack, rows).sum(), stack, create_graph=True)
    gradients(sum(g.sum() for g in loss.values()), stack)
    loss = gradients(first(stack, rows).sum(), stack, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradients(sum(g.sum() for g in loss.values()), stack)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_activation_checkpointing_does_not_recompute_with_other_weights(options: dict):
    """It would, in backward, after the fast weights have left their layers: wrong numbers and no error."""
    model, rows = tiny(layers=2).train(), random_rows()
    loss_fn = AdapterLoss(model)
    stack = stack_of(loss_fn)
    expected = gradients(loss_fn(stack, rows).sum(), stack)
    on = enable_checkpointing(model.get_base_model(), options)
    model.enable_input_require_grads()
    assert on()
    assert_equal(gradients(loss_fn(stack, rows).sum(), stack), expected, 1e-12)
    assert on()
    assert model.training


def test_scores_need_no_gradient_and_agree_with_the_loss():
    loss_fn, rows = AdapterLoss(tiny()), random_rows()
    stack = stack_of(loss_fn)
    scores = loss_fn.scores(stack, rows)
    assert not scores.loss_T.requires_grad
    torch.testing.assert_close(scores.loss_T, loss_fn(stack, rows).detach(), rtol=1e-12, atol=0)


def test_model_can_be_used_as_ever_afterwards():
    model, rows = tiny().eval(), random_rows()
    before = model(**rows.inputs).logits
    loss_fn = AdapterLoss(model)
    loss_fn(stack_of(loss_fn), rows)
    assert torch.equal(model(**rows.inputs).logits, before)


# Where an adapter is, where another one is, and options of both: layers of the other alone, and ones that PEFT runs itself.
TWO_ADAPTERS = {
    "layers of the other": (["q_proj"], ["q_proj", "down_proj"], {}),
    "an embedding": (["embed_tokens", "q_proj"], ["embed_tokens", "q_proj"], {}),
    "DoRA": (["q_proj"], ["q_proj", "down_proj"], {"use_dora": True}),
}
ONLY_OF_THE_OTHER = {
    "tokens": {"trainable_token_indices": [3, 4, 5, 6, 7]},
    "a whole embedding": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize(
    ("place", "more"),
    [*((place, "nothing") for place in TWO_ADAPTERS), *(("layers of the other", more) for more in ONLY_OF_THE_OTHER)],
)
def test_another_adapter_is_active(place: str, more: str):
    """Once the layers that PEFT runs itself ran with the other one, without a word, and once its embeddings of tokens."""
    own, others, options = TWO_ADAPTERS[place]
    model, rows = with_lora(tiny_base(layers=2), target_modules=own, **options), random_rows()
    loss_fn = AdapterLoss(model)
    stack = leaves(loss_fn.own())
    expected = loss_fn(stack, rows)
    gradient = gradients(expected.sum(), stack)
    model.add_adapter("other", LoraConfig(r=3, target_modules=others, **options, **ONLY_OF_THE_OTHER.get(more, {})))
    for name, parameter in model.named_parameters():
        if "other" in name:
            torch.nn.init.normal_(parameter)
    model.set_adapter("other")
    of_the_other = model(**rows.inputs).logits
    losses = loss_fn(stack, rows)
    assert_equal({"loss": losses, **gradients(losses.sum(), stack)}, {"loss": expected, **gradient}, 0)
    assert model.active_adapters == ["other"]
    assert torch.equal(model(**rows.inputs).logits, of_the_other)


def test_an_adapter_that_is_merged_or_switched_off_is_refused():
    """The base would be another one, or some layers run without the adapter and others with it."""
    model, rows = tiny(), random_rows()
    loss_fn = AdapterLoss(model)
    expected = loss_fn(loss_fn.own(), rows)
    with model.disable_adapter(), pytest.raises(MetaPeftError, match=r"switched off in .*disable_adapter"):
        loss_fn(loss_fn.own(), rows)
    model.merge_adapter()
    with pytest.raises(MetaPeftError, match=r"merged into .*unmerge_adapter\(\)"):
        loss_fn(loss_fn.own(), rows)
    model.unmerge_adapter()
    torch.testing.assert_close(loss_fn(loss_fn.own(), rows), expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.parametrize("how", ["unload", "delete_adapter"])
def test_an_adapter_that_is_gone_is_refused(how: str):
    """Once these were errors of torch and of a dict, far below."""
    model, rows = tiny(), random_rows()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    loss_fn = AdapterLoss(model)
    own = loss_fn.own()
    model.unload() if how == "unload" else model.delete_adapter("default")
    with pytest.raises(MetaPeftError, match=r"'default' is no longer in .*q_proj: it was deleted, or taken off"):
        loss_fn(own, rows)


def runs_of(loss_fn: AdapterLoss) -> list[int]:
    """How many rows go through the model in each forward, from now on."""
    seen: list[int] = []
    head = loss_fn.model.get_base_model().get_output_embeddings()
    embedding = loss_fn.model.get_base_model().get_input_embeddings()
    assert head is not embedding
    embedding.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


# Places for LoRA that rows of a stack do not reach in order: flattened rows, an embedding, the head.
PLACES = {"opt": ("fc1",), "llama": ("embed_tokens",), "qwen3": ("lm_head",)}


@pytest.mark.parametrize("kind", PLACES)
def test_tasks_go_one_after_the_other_where_a_stack_cannot(kind: str, monkeypatch, caplog):
    """Found out at the first call, said once, and equal to what each task gives alone."""
    monkeypatch.setattr(say_once, "_said", set())
    caplog.set_level(logging.INFO, "meta_peft")
    loss_fn = AdapterLoss(lora(base_of(kind), PLACES[kind]))
    rows, seen, stack = random_rows(), runs_of(loss_fn), stack_of(loss_fn)
    losses, scores = loss_fn(stack, rows), loss_fn.scores(stack, rows)
    assert seen[-6:] == [2] * 6
    alone = [loss_fn({n: p[t] for n, p in stack.items()}, rows.tasks(t, t + 1)) for t in range(3)]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(scores.loss_T, losses.detach(), rtol=1e-12, atol=0)
    assert len({loss.item() for loss in losses}) == 3
    said = [m for m in caplog.messages if "The tasks of a stack go through the model one after the other" in m]
    assert len(said) == 1
    assert PLACES[kind][0] in said[0]


@pytest.mark.parametrize("kind", PLACES)
def test_matrices_that_all_tasks_share_need_one_forward(kind: str):
    loss_fn = AdapterLoss(lora(base_of(kind), PLACES[kind]))
    rows, seen, weights = random_rows(), runs_of(loss_fn), dict(loss_fn.weights.parameters())
    together = loss_fn(weights, rows)
    assert seen == [6]
    torch.testing.assert_close(together, loss_fn(expand(weights, 3), rows), rtol=1e-12, atol=0)
    one = rows.tasks(0, 1)
    torch.testing.assert_close(loss_fn(expand(weights, 1), one), together[:1], rtol=1e-12, atol=0)


def test_a_stack_goes_through_at_once_where_it_can():
    for kind in ("opt", "t5", "bert"):
        model = lora(base_of(kind), {"opt": ("q_proj",), "t5": ("q",), "bert": ("dense",)}[kind])
        loss_fn = AdapterLoss(model)
        seen, rows = runs_of(loss_fn), rows_for(model.get_base_model(), n_tasks=3)
        loss_fn(stack_of(loss_fn), rows)
        assert set(seen) <= {6}


@pytest.mark.parametrize(
    ("kind", "task_type"),
    [
        ("llama", "CAUSAL_LM"),
        ("llama", "FEATURE_EXTRACTION"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("whisper", "SEQ_2_SEQ_LM"),
        ("bert", "FEATURE_EXTRACTION"),
    ],
)
def test_the_task_type_of_the_adapter_does_not_matter(kind: str, task_type: str):
    """By it PEFT chooses the class of its wrapper, some of which know of no inputs such as Whisper's."""
    losses = []
    for given in (None, task_type):
        loss_fn = AdapterLoss(lora(base_of(kind), ARCHITECTURES[kind].targets, task_type=given))
        losses.append(loss_fn(dict(loss_fn.weights.parameters()), rows_for(base_of(kind))))
    assert torch.equal(*losses)


def test_the_objective_can_be_named():
    """A decoder that reads both ways, trained to fill in: its labels stand at the same positions."""
    model, rows = tiny(), random_rows(n_tasks=1)
    weights = dict(AdapterLoss(model).weights.parameters())
    moved = Rows(rows.inputs, torch.cat([rows.labels_BL[:, 1:], torch.full((2, 1), -100)], 1), 1)
    masked = AdapterLoss(model, objective="masked_lm")(weights, moved)
    torch.testing.assert_close(masked, AdapterLoss(model)(weights, rows), rtol=1e-12, atol=0)
    with pytest.raises(MetaPeftError, match="Unknown objective 'classification'"):
        AdapterLoss(model, objective="classification")


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "whisper"])
def test_a_config_that_asks_for_tuples(kind: str):
    """Here outputs are asked for by name, whatever the config of the model or of its encoder says, and it says so again."""
    bases = [base_of(kind, return_dict=named) for named in (True, False)]
    losses = []
    for base in bases:
        loss_fn = AdapterLoss(lora(base, ARCHITECTURES[kind].targets))
        losses.append(loss_fn(loss_fn.own(), rows_for(base)))
    assert torch.equal(*losses)
    assert [base.config.return_dict for base in bases] == [True, False]
