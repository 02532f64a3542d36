from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surface import base_model, peft_model, tiny_folder, tiny_tokenizer, trained_folder, trainer
from tiny_models import fingerprint

from meta_peft import MetaPeftError, load
from meta_peft.adapters.sidecar import JSON
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.utils import patterns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_folder(), tmp_path / "meta"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, message: str) -> None:
    """Loading raises, and leaves the base model as it was, so that a good adapter then loads."""
    base = base_model()
    before = {**fingerprint(base)}
    with pytest.raises(MetaPeftError, match=message):
        load(base, folder, tokenizer=tiny_tokenizer())
    assert fingerprint(base) == before
    good = load(base, trained_folder(), tokenizer=tiny_tokenizer())
    assert len(FastWeights(good).parameters()) == 16


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_loaded(folder: Path, tmp_path: Path):
    mark = tmp_path / "it ran"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    (folder / WEIGHTS).unlink()
    refused(folder, "has no adapter_model.safetensors.*such as adapter_model.bin, are never loaded: they may run code")
    assert not mark.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert mark.exists(), "it would have run"


def test_a_base_in_a_pickle_is_not_loaded(tmp_path: Path):
    base = Path(shutil.copytree(tiny_folder(), tmp_path / "base"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(MetaPeftError, match="cannot be loaded"):
        load(str(base), trained_folder())


def test_a_weight_of_the_base_is_not_written_over(folder: Path):
    """PEFT would do it."""
    evil = {f"{Q_PROJ}.base_layer.weight": torch.zeros(64, 64)}
    save_file({**load_file(folder / WEIGHTS), **evil}, folder / WEIGHTS)
    refused(folder, "1 are others .*base_layer.weight.*do not belong together")
    values = json.loads((folder / JSON).read_text())
    edit(folder / JSON, names=[*values["names"], *evil])
    refused(folder, "names must be those of LoRA matrices; got")


def test_missing_tensors(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{Q_PROJ}.lora_A.weight"]
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "1 are missing .*q_proj.lora_A.weight")


def test_values_that_are_not_finite(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{Q_PROJ}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "holds .*q_proj.lora_A.weight with values that are not finite")


def test_tensors_of_another_shape(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{Q_PROJ}.lora_A.weight"] = torch.zeros(4, 63)
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "PEFT cannot load the adapter")


def test_a_rank_that_no_matrix_has(tmp_path: Path):
    """By a pattern each may have a smaller one."""
    model = peft_model(r=16, rank_pattern=dict.fromkeys(["q_proj", "v_proj", "o_proj", "down_proj"], 4))
    learned = trainer(tmp_path, model=model, max_steps=1)
    learned.train()
    learned.save_model()
    found = load(None, tmp_path)
    assert found.peft_config["default"].r == 16


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_cut_short(folder: Path, size: int):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    refused(folder, "is damaged or not in safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "expected a LoRA adapter, peft_type is 'IA3'"),
        ({"peft_type": ["LORA"]}, "expected a LoRA adapter"),
        ({"r": 10**9}, "r must be a whole number from 1 to 4; got 1000000000"),
        ({"r": True}, "r must be a whole number"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern must be a whole number from 1 to 4"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern should be an object by names of layers"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern should be a finite number; got 'x'"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be a finite number; got nan"),
        ({"lora_dropout": 2}, "lora_dropout should be a number from 0 to 1"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights should be one of"),
        ({"task_type": "QUESTION_ANS"}, "task_type should be one of"),
        ({"task_type": "SEQ_CLS"}, r"The head in .* has weights {}, that of LlamaForCausalLM {}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save should be None: nothing else is supported; got"),
        ({"trainable_token_indices": []}, "trainable_token_indices should be None: nothing else is supported"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config should be None"),
        ({"layer_replication": [[0, 2]] * 1000}, "layer_replication should be None"),
        ({"bias": "all"}, "bias should be 'none': nothing else is supported; got 'all'"),
        ({"target_modules": 3}, "target_modules should be a text or a list of texts"),
        ({"target_modules": ["no_such_layer"]}, "PEFT cannot load the adapter"),
        ({"target_modules": ["q_proj"]}, "LoRA matrices, the adapter has 4"),
        ({"layers_pattern": "(a+)+", "layers_to_transform": [0]}, "layers_pattern should be names of lists of layers"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform should be a whole number or a list of them"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path should be a text or null"),
    ],
)
def test_configs_that_are_refused(folder: Path, changes: dict, message: str):
    edit(folder / CONFIG, **changes)
    refused(folder, message)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_expressions_that_take_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch, option: str):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    edit(folder / CONFIG, **{option: r"(.|.)*(.|.)*(.|.)*x"})
    refused(folder, f"{option}=.* takes too long to match")


def test_modules_that_a_config_names_are_not_kept(folder: Path):
    named = {"parent_library": "antigravity", "base_model_class": "x"}
    edit(folder / CONFIG, auto_mapping=named, megatron_core="antigravity")
    config = load(base_model(), folder, tokenizer=tiny_tokenizer()).peft_config["default"]
    assert config.auto_mapping is None
    assert config.megatron_core == "megatron.core"


def test_code_of_a_base_that_only_the_adapter_names():
    with pytest.raises(MetaPeftError, match="which only the adapter names: name the base model yourself"):
        load(None, trained_folder(), trust_remote_code=True)


def test_links_are_followed_and_pipes_are_not(folder: Path, tmp_path: Path):
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    load(base_model(), folder, tokenizer=tiny_tokenizer())
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)  # reading it would wait for ever
    refused(folder, "has no adapter_config.json")
