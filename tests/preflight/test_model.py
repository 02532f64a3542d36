"""One test for each refusal, with the message that a user reads and the remedy it names; one for each switch."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from architectures import ARCHITECTURES, base_of, lora
from peft import LoraConfig, get_peft_model
from tiny_models import enable_checkpointing, fingerprint, random_rows, tiny, tiny_base, with_lora
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.preflight import check_learned_is_active, check_model
from meta_peft.utils import say_once


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """The log, as in a process that has said nothing yet."""
    monkeypatch.setattr(say_once, "_said", set())
    caplog.set_level(logging.INFO, "meta_peft")
    return caplog


def refused(model, message: str, *, second_order: bool = True) -> None:
    with pytest.raises(MetaPeftError, match=message):
        check_model(model, second_order=second_order)


def passes(model, *, second_order: bool = True) -> None:
    check_model(model, second_order=second_order)


@pytest.mark.parametrize("name", ["llama", "gpt2", "float32", "nf4", "int8"])
def test_ordinary_models_pass(model_of, name: str):
    passes(model_of(name))


def test_rank_stabilised_lora_passes():
    passes(with_lora(tiny_base(), use_rslora=True))


def test_not_a_peft_model():
    refused(tiny_base(), r"Expected a PeftModel with a LoRA adapter, got LlamaForCausalLM: wrap the model with")


def test_several_active_adapters():
    model = tiny()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    refused(
        model, r"exactly one active adapter, the model has \['default', 'second'\]: choose one with model.set_adapter"
    )
    model.set_adapter("second")
    passes(model)


def test_an_adapter_that_is_not_there():
    with pytest.raises(MetaPeftError, match=r"no adapter called 'defualt'; it has \['default'\].* Name one of these"):
        AdapterLoss(tiny(), adapter="defualt")


def test_adapter_that_is_not_lora():
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    refused(
        get_peft_model(tiny_base(), config), "Expected a LoRA adapter, 'default' is of type .*IA3.*: use LoraConfig"
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_init_that_changes_the_base(init: str):
    model = with_lora(tiny_base("llama", torch.float32), init_lora_weights=init)
    refused(model, f"init_lora_weights='{init}' changes the base weights.*Use init_lora_weights=True")
    for remedy in (True, "gaussian", "orthogonal"):
        passes(with_lora(tiny_base("llama", torch.float32), init_lora_weights=remedy))


@pytest.mark.parametrize("init", ["loftq", "corda", "eva", "lora_ga"])
def test_init_that_changes_the_base_and_needs_data(init: str):
    model = tiny()
    model.peft_config["default"].init_lora_weights = init  # to build one takes a calibration set
    refused(model, f"init_lora_weights='{init}' changes the base weights")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("trainable_token_indices", [1, 2]),
    ],
)
def test_something_else_is_trained(option: str, value: list):
    model = tiny()
    setattr(model.peft_config["default"], option, value)
    refused(model, f"{option} is set, but only LoRA matrices are meta-learned: remove it")
    setattr(model.peft_config["default"], option, None)
    passes(model)


def test_modules_to_save_of_a_model_built_with_them():
    refused(with_lora(tiny_base(), modules_to_save=["embed_tokens"]), "modules_to_save is set")


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_biases(options: dict):
    model = with_lora(tiny_base("qwen2"), target_modules=["q_proj"], **options)  # a layer with a bias
    refused(model, "set bias='none' and lora_bias=False in LoraConfig")
    passes(with_lora(tiny_base("qwen2"), bias="none", lora_bias=False))


def test_fused_experts_and_routers():
    """They are bare parameters in `transformers` 5, for which PEFT rewrites the targets."""
    model = lora(base_of("mixtral"), ("gate", "q_proj"))
    refused(model, r"target_parameters=\['gate.weight'\] adapts bare parameters.*name those to adapt in target_modules")
    model.peft_config["default"].target_parameters = ["experts.down_proj"]
    refused(model, r"target_parameters=\['experts.down_proj'\] adapts bare parameters")
    passes(lora(base_of("mixtral"), ARCHITECTURES["mixtral"].targets))


def test_adapters_that_share_their_matrices():
    targets = ["embed_tokens", "q_proj"]
    model = with_lora(base_of("gemma"), target_modules=targets, ensure_weight_tying=True)
    refused(model, "ensure_weight_tying lets two layers share their LoRA matrices.*leave it out of LoraConfig")
    passes(lora(base_of("gemma"), targets))


def test_dora(quantised_base):
    passes(with_lora(tiny_base(), use_dora=True))
    passes(with_lora(quantised_base("nf4"), use_dora=True))
    refused(
        with_lora(quantised_base("int8"), use_dora=True),
        "q_proj has DoRA on an 8-bit layer, whose scales PEFT's own forward loses.*load the base model in 4-bit or unqu",
    )


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens uses the LoRA variant DoraEmbedding"),
        ({"alora_invocation_tokens": [1]}, "q_proj uses the LoRA variant ALoraLinear"),
    ],
)
def test_lora_variant(options: dict, variant: str):
    model = with_lora(tiny_base("llama", torch.float32), **options)
    refused(
        model, rf"{variant}, whose weights or derivatives are not known here: use plain LoRA, rsLoRA.*or DoRA on lin"
    )


def test_merged_adapter():
    model = tiny()
    model.merge_adapter()
    refused(model, r"The adapter is merged into .*q_proj: call model.unmerge_adapter\(\) first")
    model.unmerge_adapter()
    passes(model)


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_another_adapter_is_merged_into_the_base():
    """In layers that the adapter has no part of, nothing else would tell."""
    model = with_lora(tiny_base(), target_modules=["v_proj"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter(["other"])
    refused(model, r"Another adapter, 'other', is merged into .*q_proj: .* model.unmerge_adapter\(\) first")
    model.unmerge_adapter()
    passes(model)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "alpha_pattern": {"k_proj": 7}, "rank_pattern": {"v_proj": 3}}]
)
def test_a_scale_that_is_not_saved(options):
    """Stock PEFT would load the adapter with the scale of its config."""
    model = with_lora(tiny_base(), **options)
    passes(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.set_scale("default", 0.5)
    refused(model, r"up_proj scales its adapter by [\d.]+, and by lora_alpha and r it would be [\d.]+: set_scale")
    layer.set_scale("default", 1)
    passes(model)


def test_convolution():
    base = tiny_base()
    base.model.extra = nn.Conv1d(4, 4, 1, dtype=torch.float64)
    refused(with_lora(base, target_modules=["extra"]), "extra is a Conv1d with LoRA; only linear layers and embeddings")
    passes(with_lora(tiny_base(), target_modules=["q_proj"]))


def test_multihead_attention_of_torch():
    """PEFT merges and unmerges its weights in every forward."""
    base = tiny_base()
    base.model.extra = nn.MultiheadAttention(16, 2, dtype=torch.float64)
    refused(
        with_lora(base, target_modules=["extra"]), "extra is a MultiheadAttention with LoRA; only linear layers and"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_weights_in_half_precision(dtype: torch.dtype):
    model = tiny("llama", torch.bfloat16)
    passes(model)  # PEFT keeps LoRA weights in float32
    for name, module in model.named_modules():
        if ".lora_" in name:
            module.to(dtype)
    refused(model, rf"q_proj.lora_A.weight is in {dtype}, which.*autocast_adapter_dtype=True")


def test_some_lora_matrices_that_are_frozen():
    """As in LoRA-FA: they would be learned all the same. All of them are, where an adapter was loaded to be used."""
    model = with_lora(tiny_base())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    with pytest.raises(
        MetaPeftError, match=r"matrices need no gradient \(.*lora_A.*every one of an adapter is learned"
    ):
        check_model(model, second_order=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    check_model(model, second_order=False)


def test_a_base_in_bfloat16_is_named_in_second_order(said):
    model = with_lora(tiny_base().to(torch.bfloat16))
    check_model(model, second_order=False)
    assert "bfloat16" not in said.text
    check_model(model, second_order=True)
    assert "bfloat16, in which little of a second derivative" in said.text


def test_embedding_and_output_head_pass():
    passes(with_lora(tiny_base(), target_modules=["embed_tokens", "q_proj"]))
    passes(with_lora(tiny_base(), target_modules=["lm_head", "q_proj"]))


def test_embedding_weights_in_half_precision():
    model = with_lora(tiny_base("llama", torch.bfloat16), target_modules=["embed_tokens"])
    layer = model.get_base_model().model.embed_tokens
    layer.lora_embedding_A["default"].data = layer.lora_embedding_A["default"].data.bfloat16()
    refused(model, "embed_tokens.lora_embedding_A is in torch.bfloat16, which swallows small inner steps")


def test_unsloth():
    """By the name of the module that patches come from: the package itself needs a GPU to be installed."""
    model = tiny()
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.__class__ = type("FastMLP", (type(mlp),), {"__module__": "unsloth.models.llama"})
    refused(model, "mlp is patched by Unsloth, whose kernels overwrite activations")
    mlp.__class__ = mlp.__class__.__mro__[1]

    def forward(x):
        return x

    forward.__module__ = "unsloth.kernels.fast_lora"
    mlp.forward = forward
    refused(model, "mlp is patched by Unsloth")
    del mlp.forward
    passes(model)


def test_model_without_a_head():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=10, **sizes))
    lora = LoraConfig(target_modules=["q_proj"])
    refused(get_peft_model(model, lora), "LlamaModel has no language-modelling head.*AutoModelForCausalLM")
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    refused(plain, "Sequential has no language-modelling head")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tested_architecture_passes(kind: str):
    passes(lora(base_of(kind), ARCHITECTURES[kind].targets))


SWITCH = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "num_experts": 2}


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("deepseek_v3", {"n_routed_experts": 2, "moe_intermediate_size": 8, "q_lora_rank": None}),
        ("phimoe", {"num_local_experts": 2}),
    ],
)
def test_mixture_of_experts_that_is_not_known(kind: str, experts: dict):
    base = tiny_base(kind, torch.float32, **experts)
    refused(
        with_lora(base, target_modules=["o_proj"]),
        r"is a mixture of experts that is not known to route each token by itself.*Use one of \['mixtral', .* or a dense",
    )


def test_experts_of_limited_capacity():
    """In Switch Transformers the tokens of other tasks decide whether a token is dropped."""
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("switch_transformers", vocab_size=40, **SWITCH))
    refused(with_lora(base, target_modules=["q", "v"]), "with limited capacity, for one, the tokens of different tasks")


@pytest.mark.parametrize("experts", ["deepgemm", "sonicmoe"])
def test_experts_without_a_second_derivative(experts: str):
    model = lora(base_of("mixtral"), ARCHITECTURES["mixtral"].targets)
    model.get_base_model().config._experts_implementation = experts  # they need a GPU to run
    passes(model, second_order=False)
    refused(
        model, rf"experts_implementation='{experts}' is not known to have a second derivative. Load the model with one"
    )
    for remedy in ("eager", "batched_mm", "grouped_mm"):
        model.get_base_model().config._experts_implementation = remedy
        passes(model)


@pytest.mark.parametrize(
    "attention",
    ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "kernels-community/flash-attn"],
)
def test_fused_attention_in_second_order(attention: str):
    model = tiny()
    model.get_base_model().config._attn_implementation = attention  # most of them cannot be loaded without a GPU
    passes(model, second_order=False)
    refused(
        model, f"attn_implementation='{attention.replace('|', '.')}' has no second derivative.*='sdpa', or use a first"
    )
    for remedy in ("sdpa", "eager"):
        model.get_base_model().set_attn_implementation(remedy)
        passes(model)


def test_sdpa_is_switched_to_matrix_products(said):
    passes(tiny(), second_order=False)
    assert not said.messages
    passes(tiny())
    passes(tiny())
    assert said.messages == [
        "Attention runs as ordinary matrix products in the inner loop: fused kernels have no second derivative."
    ]


def test_float16_base():
    model = tiny("llama", torch.float16)
    refused(model, "base model is in float16, and gradient scaling.*Load it with dtype='bfloat16' or 'float32'")
    passes(tiny("llama", torch.bfloat16))


@pytest.mark.parametrize("part", ["", "base_model.model", "base_model.model.model.layers.0.mlp"])
def test_compiled_model(part: str):
    model = tiny()
    module = model.get_submodule(part)
    module.compile()
    refused(model, f"{part or 'The model'} is compiled; torch.compile has no second derivative")
    module._compiled_call_impl = None
    passes(model)


@pytest.mark.parametrize("part", ["base_model.model", "base_model.model.model.layers.0.mlp"])
def test_compiled_forward(part: str):
    """As the documentation of transformers has it: ``model.forward = torch.compile(model.forward)``."""
    model = tiny()
    module = model.get_submodule(part)
    module.forward = torch.compile(module.forward)
    refused(model, f"{part} is compiled; torch.compile has no second derivative.*have the forwards of their classes")
    refused(model, f"{part} is compiled", second_order=False)
    del module.forward
    passes(model)


def test_forward_that_the_compiler_is_to_leave_alone():
    model = tiny()
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = torch.compiler.disable(mlp.forward)
    passes(model)


def test_model_around_a_compiled_one():
    """Compiled before the adapter was put in, as a whole."""
    model = get_peft_model(torch.compile(tiny_base()), LoraConfig(target_modules=["q_proj"]))
    refused(model, "is compiled; torch.compile has no second derivative")


def test_compiled_peft_model():
    refused(torch.compile(tiny()), "Expected a PeftModel|is compiled")


def test_activation_checkpointing_is_switched_off(said):
    model = tiny().train()
    enable_checkpointing(model.get_base_model(), {"use_reentrant": False})
    passes(model)
    passes(model)
    assert sum("Activation checkpointing is off in the inner loop" in message for message in said.messages) == 1


def test_dropout_is_switched_off(said):
    model = with_lora(tiny_base(), lora_dropout=0.25).train()
    passes(model)
    assert "lora_dropout=0.25 is not applied: the inner loop's loss has to be a fixed function." in said.messages
    loss_fn, rows = AdapterLoss(model), random_rows()
    weights = dict(loss_fn.weights.parameters())
    assert torch.equal(loss_fn(weights, rows), loss_fn(weights, rows))


def test_other_quantisation(model_of):
    model = tiny()
    base = model.get_base_model()
    base.is_quantized = True  # the backends of other methods are not installed
    base.config.quantization_config = SimpleNamespace(quant_method="gptq")
    refused(model, "quantised with gptq; only bitsandbytes 4-bit and 8-bit are supported")


def test_options_that_are_not_known():
    """Once an adapter was trained with it, and refused by load."""
    refused(
        with_lora(tiny_base(), use_qalora=True),
        r"use_qalora=True of LoraConfig is not known here, and load would refuse",
    )


def test_8_bit_layers_with_weights_in_16_bit(model_of):
    model = model_of("int8")
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.state.has_fp16_weights = True
    refused(model, r"q_proj.base_layer keeps 16-bit weights .*: load the base with load_in_8bit=True alone")


def test_autocast(said):
    """In float16 it is what a base in float16 is refused for."""
    model, rows = tiny(dtype=torch.float32), random_rows()
    loss_fn = AdapterLoss(model)
    weights = dict(loss_fn.weights.parameters())
    with torch.autocast("cpu", torch.float16), pytest.raises(MetaPeftError, match=r"autocast computes in float16 here"):
        loss_fn(weights, rows)
    with torch.autocast("cpu", torch.bfloat16):
        loss_fn(weights, rows)
        loss_fn(weights, rows)
    assert sum("torch.autocast computes products in torch.bfloat16 here" in message for message in said.messages) == 1
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        loss_fn(weights, rows)


def test_layers_repacked_for_inference(model_of):
    """What bitsandbytes does in place on CPUs with AVX512-BF16; the flag is all that is looked at."""
    model = model_of("nf4")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    refused(
        model, "q_proj.base_layer was repacked for CPU inference, which rounds its weights. Load the base model anew"
    )
    layer.weight.quant_state.packing_format_for_cpu = False
    passes(model)


def test_layers_are_not_repacked_afterwards(model_of):
    model = model_of("nf4").eval()
    for _, layer in model.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    before = fingerprint(model)
    loss_fn = AdapterLoss(model)
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert flags == [False] * 14
    loss_fn.scores(dict(loss_fn.weights.parameters()), random_rows())
    with torch.no_grad():
        model(**random_rows().inputs)
    assert fingerprint(model) == before


def test_another_adapter_than_the_meta_learned_one_is_active():
    model = tiny()
    model.add_adapter("adapted", model.peft_config["default"])
    check_learned_is_active(model)
    model.meta_peft = SimpleNamespace(adapter="default")  # as `adapters.hub.attach` leaves it
    check_learned_is_active(model)
    model.set_adapter("adapted")
    with pytest.raises(
        MetaPeftError,
        match=r"active adapter is 'adapted', and the meta-learned one is 'default'.*set_adapter\('default'\) after it",
    ):
        check_learned_is_active(model)
    passes(model)  # to be adapted from, scored or served it may be any


def test_layers_that_are_repeated():
    """The adapter would not be found to fit its base again."""
    model = with_lora(tiny_base())
    model.peft_config["default"].layer_replication = [[0, 1], [0, 1]]
    refused(model, "layer_replication makes another base model of the base")
