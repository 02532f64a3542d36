from __future__ import annotations

import pytest
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


def test_other_errors_of_peft_come_through():
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        with_adapter(base_model(), lora(r=0))
