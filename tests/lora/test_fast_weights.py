from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict
from tiny_models import VOCAB, random_rows, tiny, tiny_base, with_lora
from torch import nn

from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.lora.fast_weights import FastWeights, active_adapter, meta_learned_adapter
from meta_peft.params import expand


@pytest.mark.parametrize(
    "model",
    [
        tiny,
        lambda: tiny("gpt2"),
        lambda: with_lora(tiny_base(), target_modules=["embed_tokens", "q_proj", "lm_head"]),
        lambda: with_lora(tiny_base(), use_dora=True),
    ],
    ids=["llama", "gpt2", "embedding and head", "DoRA"],
)
def test_names_and_values_are_those_that_peft_saves(model: Callable):
    model = model()
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)  # else PEFT adds the base's embedding
    mine = FastWeights(model).parameters()
    assert set(mine) == set(saved)
    assert all(torch.equal(mine[name], saved[name]) for name in saved)


def test_what_else_an_adapter_trains_is_no_fast_weight():
    model = with_lora(tiny_base(), modules_to_save=["embed_tokens"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in name for name in trainable)
    assert all("lora_A" in name or "lora_B" in name for name in FastWeights(model).parameters())


def test_only_the_active_adapter():
    model = tiny()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    weights = FastWeights(model)
    assert weights.adapter == "other"
    assert [tuple(p.shape) for p in weights.parameters().values()] == [(3, 16), (16, 3)]
    assert len(FastWeights(model, "default").parameters()) == 14


def test_the_meta_learned_adapter_is_the_one_that_the_model_carries():
    model = tiny()
    assert meta_learned_adapter(model) is None
    model.meta_peft = SimpleNamespace(adapter="default")  # as `adapters.hub.attach` leaves it
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert (meta_learned_adapter(model), active_adapter(model)) == ("default", "other")


def test_load_copies_into_the_parameters_of_the_model():
    model = tiny()
    weights = FastWeights(model)
    parameters = weights.parameters()
    values = {name: torch.full_like(p, 0.5) for name, p in parameters.items()}
    weights.load_(values)
    assert all(weights.parameters()[name] is p and torch.equal(p, values[name]) for name, p in parameters.items())
    assert torch.equal(get_peft_model_state_dict(model)[next(iter(values))], next(iter(values.values())))


def test_no_lora_layer_is_an_error():
    with pytest.raises(MetaPeftError, match="no LoRA layer with an adapter called 'absent'"):
        FastWeights(tiny(), "absent")


def test_several_active_adapters_are_an_error():
    model = tiny()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(MetaPeftError, match=r"exactly one active adapter, the model has \['default', 'second'\]"):
        active_adapter(model)


def test_installed_values_are_used_and_taken_out_again():
    """Three tasks' matrices in one layer, each met by its own rows; afterwards the model is as it was."""
    model = tiny()
    weights = FastWeights(model)
    own, keys = weights.parameters(), list(model.state_dict())
    name, parameter = next(iter(own.items()))
    linear = model.get_submodule(name.replace(".weight", ".default"))
    stack = expand(dict(own), 3)
    stack[name] = torch.randn(3, *parameter.shape, dtype=torch.float64)
    x = torch.randn(6, 4, 16, dtype=torch.float64)
    with weights.installed(stack):
        y = linear(x)
        assert isinstance(linear, nn.Linear)  # PEFT asks
    expected = torch.cat([F.linear(x[2 * t : 2 * t + 2], stack[name][t]) for t in range(3)])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    assert type(linear) is nn.Linear
    assert linear.weight is parameter
    assert "weight" not in linear.__dict__
    assert list(model.state_dict()) == keys


def test_installed_matrices_of_an_embedding():
    """They are bare parameters, side by side with those of other adapters."""
    model = with_lora(tiny_base(), target_modules=["embed_tokens"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["embed_tokens"]))
    weights, keys, ids = FastWeights(model), list(model.state_dict()), random_rows().inputs["input_ids"]
    own, layer = weights.parameters(), model.get_base_model().get_input_embeddings()
    assert [tuple(p.shape) for p in own.values()] == [(2, VOCAB), (16, 2)]
    values = {n: torch.randn(p.shape, dtype=p.dtype, requires_grad=True) for n, p in own.items()}
    with weights.installed(values):
        y = layer(ids)
    a, b = values.values()
    torch.testing.assert_close(y, layer.base_layer.weight[ids] + 2 * (a.T[ids] @ b.T), rtol=1e-12, atol=1e-14)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.sum(), list(values.values())))
    assert all(weights.parameters()[n] is p for n, p in own.items())
    assert list(model.state_dict()) == keys
    assert not {"default", "other"} & (set(layer.lora_embedding_A.__dict__) | set(layer.lora_embedding_B.__dict__))


class FailureError(Exception):
    pass


@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.self_attn", "lm_head"])
def test_model_is_restored_after_an_exception_inside_a_forward(where: str):
    model = tiny(layers=2).train()
    loss_fn = AdapterLoss(model)
    rows, values = random_rows(), {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
    before, keys = loss_fn(values, rows), list(model.state_dict())
    attributes = {
        n: (type(m), set(m.__dict__), m.training, len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }

    def fail(*_):
        raise FailureError

    hook = model.get_base_model().get_submodule(where).register_forward_hook(fail)
    with pytest.raises(FailureError):
        loss_fn(expand(values, 3), rows)
    hook.remove()
    after = {n: (type(m), set(m.__dict__), m.training, len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert after == attributes
    assert list(model.state_dict()) == keys
    assert torch.equal(loss_fn(values, rows), before)


def test_rows_that_an_architecture_rearranges_are_refused():
    model = tiny()
    weights = FastWeights(model)
    name = next(iter(weights.parameters()))
    linear, matrix = model.get_submodule(name.replace(".weight", ".default")), weights.parameters()[name]
    flat = torch.randn(12, 16, dtype=torch.float64)
    with weights.installed(expand(dict(weights.parameters()), 3)):
        for x in (flat, flat.view(4, 3, 16)):
            with pytest.raises(MetaPeftError, match="Set tasks_per_forward to 1"):
                linear(x)
    # with one task, any shape will do
    with weights.installed(expand(dict(weights.parameters()), 1)):
        torch.testing.assert_close(linear(flat), F.linear(flat, matrix))
