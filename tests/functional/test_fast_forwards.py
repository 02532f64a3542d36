"""Which layers run otherwise while losses are computed: those of known classes, and no others."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from peft import PeftModel
from tiny_models import assert_equal, random_rows, tiny_base, with_lora
from torch import nn

from meta_peft.frozen.linear import quantised_layers
from meta_peft.functional import fast_forwards as module
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.fast_forwards import fast_forwards
from meta_peft.functional.padding import TokenPositions
from meta_peft.lora.dora import _forward as dora_forward
from meta_peft.params import expand, gradients, leaves

NAMES = {
    module._lora_layer: "LoRA",
    module._frozen_layer: "quantised",
    module._dense_layer: "dense",
    dora_forward: "DoRA",
    module._norm: "norm",
    module._gated_layer: "gated",
}


def chosen(model: PeftModel) -> dict[str, str]:
    """What each module with another forward gets, by its path in the base model."""
    paths = {m: path.removeprefix("base_model.model.") for path, m in model.named_modules()}
    found = fast_forwards(model, "default", TokenPositions())
    assert len({id(layer) for layer, _ in found}) == len(found)
    assert all(isinstance(forward, partial) for _, forward in found)
    return {paths[layer]: NAMES[forward.func] for layer, forward in found}


def kinds(model: PeftModel) -> Counter[str]:
    return Counter(chosen(model).values())


def test_llama():
    """Float32, where norms are transformers' own: two a layer and one at the end."""
    model = with_lora(tiny_base("llama", torch.float32, layers=2), target_modules=["q_proj", "down_proj"])
    found = chosen(model)
    assert Counter(found.values()) == {"LoRA": 4, "dense": 10, "norm": 5, "gated": 2}
    assert found["model.layers.1.self_attn.q_proj"] == found["model.layers.0.mlp.down_proj"] == "LoRA"
    assert found["model.layers.0.mlp"] == "gated"
    assert found["model.norm"] == "norm"


def test_qwen3_norms_queries_and_keys_too():
    model = with_lora(tiny_base("qwen3", torch.float32), target_modules=["q_proj"])
    assert kinds(model) == {"LoRA": 1, "dense": 6, "norm": 5, "gated": 1}


def test_gpt2():
    """Its norms and its feed-forward layers have other formulas; its layers are Conv1D."""
    model = with_lora(tiny_base("gpt2", torch.float32))
    assert kinds(model) == {"LoRA": 4}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_llama(quantised_base, kind: str):
    """Quantised layers with LoRA run as LoRA layers, those without as frozen products."""
    model = with_lora(quantised_base(kind), target_modules=["q_proj", "v_proj"])
    found = chosen(model)
    assert Counter(found.values()) == {"LoRA": 4, "quantised": 10, "norm": 5, "gated": 2}
    assert found["model.layers.0.self_attn.k_proj"] == "quantised"
    assert "model.layers.0.self_attn.q_proj.base_layer" not in found
    assert len(quantised_layers(model)) == 14


def test_dora():
    """Its magnitudes get a forward, its layers stay PEFT's; on a quantised base, the products inside do not."""
    model = with_lora(tiny_base("llama", torch.float32), target_modules=["q_proj", "v_proj"], use_dora=True)
    assert kinds(model) == {"DoRA": 2, "dense": 5, "norm": 3, "gated": 1}


def test_dora_on_quantised_layers(quantised_base):
    model = with_lora(quantised_base("nf4"), target_modules=["q_proj"], use_dora=True)
    found = chosen(model)
    assert Counter(found.values()) == {"DoRA": 2, "quantised": 14, "norm": 5, "gated": 2}
    assert found["model.layers.0.self_attn.q_proj.base_layer"] == "quantised"


def test_layers_of_an_embedding_or_with_another_adapter_stay():
    model = with_lora(tiny_base("llama", torch.float32), target_modules=["embed_tokens", "q_proj"])
    model.add_adapter("other", with_lora(tiny_base(), target_modules=["v_proj"]).peft_config["default"])
    found = chosen(model)
    assert [path for path, name in found.items() if name == "LoRA"] == ["model.layers.0.self_attn.q_proj"]


def test_classes_that_are_not_known_stay_as_they_are():
    """A subclass may compute something else, under whatever name."""
    model = with_lora(tiny_base("llama", torch.float32), target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0]

    class Scaled(type(layer.input_layernorm)):
        def forward(self, x):
            return 3 * super().forward(x)

    class Clamped(type(layer.mlp)):
        def forward(self, x):
            return super().forward(x).clamp(-0.1, 0.1)

    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs()

    for part, kind in ((layer.input_layernorm, Scaled), (layer.mlp, Clamped)):
        part.__class__ = kind
    layer.self_attn.q_proj.base_layer.__class__ = Linear
    assert kinds(model) == {"dense": 6, "norm": 2}
    loss_fn, rows = AdapterLoss(model), random_rows(n_tasks=1)
    expected = model.eval()(**rows.inputs, labels=rows.labels_BL).loss
    torch.testing.assert_close(loss_fn(dict(loss_fn.weights.parameters()), rows), expected.view(1))


def test_a_gate_with_another_activation_stays():
    for activation, gated in (("silu", 1), ("swish", 1), ("gelu", 0), ("relu", 0)):
        model = with_lora(tiny_base("llama", torch.float32, hidden_act=activation), target_modules=["q_proj"])
        assert kinds(model)["gated"] == gated, activation
    model = with_lora(tiny_base("gemma", torch.float32), target_modules=["q_proj"])  # its norm multiplies by 1 + weight
    assert kinds(model) == {"LoRA": 1, "dense": 6}


@pytest.mark.parametrize("name", ["llama", "gpt2", "float32", "nf4"])
def test_a_model_is_as_it_was_after_a_call_and_after_an_error_in_one(model_of, name: str):
    model = model_of(name)
    before = {path: (set(m.__dict__), m.__dict__.get("forward")) for path, m in model.named_modules()}
    loss_fn, rows = AdapterLoss(model), random_rows()
    stack = leaves(expand(dict(loss_fn.weights.parameters()), 3))
    gradients(loss_fn(stack, rows).sum(), stack)
    with pytest.raises(IndexError):
        loss_fn(stack, random_rows().__class__({"input_ids": torch.full((6, 6), 10**6)}, rows.labels_BL, 3))
    after = {path: (set(m.__dict__), m.__dict__.get("forward")) for path, m in model.named_modules()}
    noted = {"support_avx512bf16_for_cpu"}  # by bitsandbytes, see test_outer_loop
    assert {p: (a - noted, f) for p, (a, f) in after.items()} == {p: (a - noted, f) for p, (a, f) in before.items()}


def test_results_are_those_of_the_forwards_they_replace(monkeypatch: pytest.MonkeyPatch):
    """Loss, gradient, and a product with the Hessian, of a float32 Llama with transformers' own norms and gates."""
    model, rows = with_lora(tiny_base("llama", torch.float32, layers=2)), random_rows()
    found = []
    for replaced in (fast_forwards, lambda model, adapter, positions: []):
        monkeypatch.setattr("meta_peft.functional.adapter_loss.fast_forwards", replaced)
        loss_fn = AdapterLoss(model)
        stack = leaves(expand(dict(loss_fn.weights.parameters()), 3))
        loss_T = loss_fn(stack, rows)
        grads = gradients(loss_T.sum(), stack, create_graph=True)
        product = gradients(sum((g**2).sum() for g in grads.values()), stack)
        found.append(({"loss": loss_T.detach()}, {n: g.detach() for n, g in grads.items()}, product))
    for ours, expected in zip(*found, strict=True):
        assert_equal(ours, expected, 1e-4)


def test_weights_are_those_that_the_layers_have_now():
    """A model may be moved once its losses are bound, as `Module.to` does it: by other tensors in its parameters."""
    model = with_lora(tiny_base("llama"))
    loss_fn, rows = AdapterLoss(model), random_rows()
    before = loss_fn(loss_fn.own(), rows)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() if parameter.requires_grad else parameter.data * 1.1
    after = loss_fn(loss_fn.own(), rows)
    assert (after - before).abs().max() > 1e-3
    assert_equal({"": after}, {"": AdapterLoss(model)(loss_fn.own(), rows)}, 1e-12)
