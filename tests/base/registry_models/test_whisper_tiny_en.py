"""A random Whisper in CTranslate2's format becomes the model that it was made from."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from meta_peft import MetaPeftError
from meta_peft.base.registry_models.ctranslate2 import DTYPES, read_variables
from meta_peft.base.registry_models.whisper_tiny_en import END_OF_TEXT, NO_TIMESTAMPS, START_OF_TRANSCRIPT, convert

WIDTH, VOCABULARY = 8, 51864  # the real vocabulary: the special tokens are at its end


def write_ctranslate2(path: Path, variables: dict[str, np.ndarray], version: int = 6) -> None:
    kinds = {np.dtype(dtype): number for number, dtype in DTYPES.items()}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    blocks = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        blocks += [text(name), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        blocks += [struct.pack("<BI", kinds[value.dtype], value.nbytes), value.tobytes()]
    blocks += [struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    path.write_bytes(b"".join(blocks))


def in_ctranslate2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The variables that CTranslate2's converter writes, in half precision, with a few that are no weights."""
    state = {name: value.half().numpy() for name, value in model.model.state_dict().items()}
    variables: dict[str, np.ndarray] = {"encoder/num_heads": np.array(2, np.int16)}
    variables |= {"decoder/pre_norm": np.array(1, np.int8), "decoder/scale_embeddings": np.array(0, np.int8)}

    def dense(target: str, *sources: str) -> None:
        variables[f"{target}/weight"] = np.concatenate([state[f"{source}.weight"] for source in sources])
        biases = [state.get(f"{source}.bias", np.zeros(WIDTH, np.float16)) for source in sources]
        variables[f"{target}/bias"] = np.concatenate(biases)

    def norm(target: str, source: str) -> None:
        variables[f"{target}/gamma"], variables[f"{target}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    dense("encoder/conv1", "encoder.conv1")
    dense("encoder/conv2", "encoder.conv2")
    variables["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        variables[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(2):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            dense(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{part}_proj" for part in "qkv"))
            dense(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            dense(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            dense(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            if side == "decoder":
                dense(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                dense(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{part}_proj" for part in "kv"))
                dense(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
    return variables


@pytest.fixture(scope="module")
def original() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, max_source_positions=10, init_std=0.3, **sizes, **heads
    )
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).half().float()
    return model


@pytest.fixture(scope="module")
def files(original: WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_ctranslate2(folder / "model.bin", in_ctranslate2(original))
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "whisper"
    convert(files, folder)
    return folder


def test_the_model_computes_what_it_computed(made: Path, original: WhisperForConditionalGeneration):
    model = WhisperForConditionalGeneration.from_pretrained(made).eval()
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    audio, ids = torch.randn(2, 80, 20), torch.tensor([[START_OF_TRANSCRIPT, NO_TIMESTAMPS, 5, 6]] * 2)
    with torch.no_grad():
        expected, found = (m(input_features=audio, decoder_input_ids=ids).logits for m in (original, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_generation_starts_and_ends_where_whisper_does(made: Path):
    config = GenerationConfig.from_pretrained(made)
    assert (config.decoder_start_token_id, config.eos_token_id) == (START_OF_TRANSCRIPT, END_OF_TEXT)
    assert config.no_timestamps_token_id == NO_TIMESTAMPS
    assert config.is_multilingual is False


def test_the_processor_reads_sound_and_writes_text(made: Path):
    processor = AutoProcessor.from_pretrained(made)
    features = processor.feature_extractor(np.zeros(1600), sampling_rate=16_000).input_features
    assert np.shape(features) == (1, 80, 3000)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == "<|endoftext|>"
    assert processor.tokenizer.decode(processor.tokenizer("Haus am See", add_special_tokens=False).input_ids) == (
        "Haus am See"
    )


def test_another_version_of_the_format_is_refused(tmp_path: Path):
    write_ctranslate2(tmp_path / "model.bin", {}, version=5)
    with pytest.raises(MetaPeftError, match="has version 5 of CTranslate2's format, expected 6"):
        read_variables(tmp_path / "model.bin")
