from __future__ import annotations

import kinds
import pytest
from architectures import base_of
from surface import base_model, lora

from meta_peft import MetaPeftError, ModelArguments
from meta_peft.base import lora_config, with_adapter


def test_lora_config_of_arguments():
    args = ModelArguments(
        lora_r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, lora_target_modules=["q_proj"], lora_layers=[1]
    )
    config = lora_config(args)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.1, True)
    assert config.task_type == "CAUSAL_LM"
    model = with_adapter(base_model(), config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{matrix}.default.weight" for matrix in "AB"
    }


def test_all_linear():
    model = with_adapter(base_model(), lora_config(ModelArguments(lora_target_modules=["all-linear"])))
    adapted = {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad}
    assert adapted == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["qkv", "fc"]}, r"lora_target_modules=\['fc', 'qkv'\] with lora_layers=None match"),
        ({"target_modules": "nothing"}, "lora_target_modules=nothing"),
        ({"layers_to_transform": [2, 3]}, r"lora_layers=\[2, 3\] match"),
    ],
)
def test_targets_that_match_nothing(options: dict, said: str):
    with pytest.raises(MetaPeftError, match=said) as error:
        with_adapter(base_model(), lora(**options))
    assert "no layer of LlamaForCausalLM" in str(error.value)
    assert "'down_proj', 'gate_proj', 'k_proj', 'lm_head'" in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_modules": ["q_proj", "v_prj"]},
            r"^lora_target_modules=\['v_prj'\] match no layer of LlamaForCausalLM",
        ),
        ({"layers_to_transform": [1, 7]}, r"^lora_layers=\[7\] match no layer of .* in layers 0 to 2 - 1: correct"),
        ({"layers_to_transform": [-1, 0]}, r"^lora_layers=\[-1\] match no layer"),
        (
            {"target_modules": ["q_proj", "v_prj"], "layers_to_transform": [1, 7]},
            r"^lora_target_modules=\['v_prj'\] with lora_layers=\[1, 7\] and lora_layers=\[7\] match no layer",
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]},
            r"\['embed_tokens'\] with lora_lay",
        ),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj"]},
            "layers.9.self_attn",
        ),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [0, 1]}, r"lora_layers=\[1\]"),
    ],
)
def test_targets_that_match_in_part(options: dict, said: str):
    """Once the rest was trained, without a word."""
    base = base_model()
    with pytest.raises(MetaPeftError, match=said):
        with_adapter(base, lora(**options))
    with_adapter(base, lora())  # which the error left as it was


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "o_proj"]}, 4),
        ({"target_modules": r".*layers\.1\..*(q|nothing)_proj"}, 1),
        ({"target_modules": ["self_attn.q_proj"], "layers_to_transform": 1}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, 1),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [0]}, 1),
        ({"target_modules": None, "layers_to_transform": [0]}, 2),
        ({"target_modules": ["q_proj", "lm_head"]}, 3),
    ],
)
def test_targets_that_all_match(options: dict, n: int):
    model = with_adapter(base_model(), lora(**options))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == n


@pytest.mark.parametrize("kind", ["seq2seq_lm", "speech_seq2seq", "sequence_classification"])
def test_a_layer_of_one_stack_is_enough(kind: str):
    """With an encoder and a decoder, or with a head that is learned as a whole."""
    kinds.peft_model(kind, lora_layers=[0])
    with pytest.raises(MetaPeftError, match=r"^lora_layers=\[5\] match no layer"):
        kinds.peft_model(kind, lora_layers=[0, 5])


def test_of_the_default_targets_some_are_enough():
    """Which nobody chose for this base; OPT's layers are called otherwise but for two."""
    model = with_adapter(base_of("opt"), lora_config(ModelArguments("opt")))
    assert {n.split(".")[-4] for n, _ in model.named_parameters() if "lora_A" in n} == {"q_proj", "v_proj"}
    with pytest.raises(MetaPeftError, match=r"^lora_target_modules=\['down_proj', 'o_proj'\] match no layer"):
        with_adapter(base_of("opt"), lora(target_modules=["q_proj", "o_proj", "down_proj"]))


def test_other_errors_of_peft_come_through():
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        with_adapter(base_model(), lora(r=0))
