from __future__ import annotations

import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from surface import base_model, tiny_folder

from meta_peft import MetaPeftError, ModelArguments
from meta_peft.base import load_base, load_tokenizer
from meta_peft.frozen.linear import quantised_layers


def test_a_base_is_frozen_and_keeps_its_name():
    model = base_model()
    assert model.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert model.name_or_path == str(tiny_folder())


@pytest.mark.parametrize(
    ("options", "kind", "dtype"),
    [
        ({"load_in_4bit": True}, bnb.nn.Linear4bit, torch.float32),
        ({"load_in_4bit": True, "dtype": "bfloat16"}, bnb.nn.Linear4bit, torch.bfloat16),
        ({"load_in_8bit": True}, bnb.nn.Linear8bitLt, torch.float32),
        ({"dtype": "bfloat16"}, torch.nn.Linear, torch.bfloat16),
    ],
)
def test_precision(options: dict, kind: type, dtype: torch.dtype):
    model = load_base(ModelArguments(str(tiny_folder()), **options))
    projection = model.get_submodule("model.layers.1.mlp.up_proj")
    assert type(projection) is kind
    assert len(quantised_layers(model)) == (0 if kind is torch.nn.Linear else 14)
    assert model.get_input_embeddings().weight.dtype == dtype
    if kind is bnb.nn.Linear4bit:
        assert projection.compute_dtype == dtype
        assert projection.weight.quant_type == "nf4"


def test_4bit_options_arrive():
    model = load_base(
        ModelArguments(str(tiny_folder()), load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    )
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.quant_type == "fp4"
    assert weight.quant_state.nested


def test_attention_option_arrives():
    model = load_base(ModelArguments(str(tiny_folder()), attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["some/model-that-is-not-there", "."])
def test_a_base_that_is_not_there(name: str):
    with pytest.raises(MetaPeftError, match=f"The base model '{name}' cannot be loaded: "):
        load_base(ModelArguments(name))
    with pytest.raises(MetaPeftError, match=f"The tokenizer of '{name}' cannot be loaded: "):
        load_tokenizer(name)


def test_a_base_whose_weights_are_cut_short(tmp_path: Path):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "base"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(MetaPeftError, match=r"The base model '.*base' cannot be loaded: "):
        load_base(ModelArguments(str(folder)))
