"""A tiny random base in a folder for each objective, with a tokenizer or processor, and tasks that it can be trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from surface import config, letter_rows, temporary_folder
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

from meta_peft import MetaTrainer, ModelArguments
from meta_peft.base import load_base, load_tokenizer, lora_config, with_adapter

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BERT = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
LETTERS = "abcd"


@dataclass(frozen=True)
class Kind:
    """A model type with its sizes, where LoRA goes, and how many classes a head has."""

    objective: str
    model_type: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    loaded_with: Any = AutoModel
    num_labels: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


HEAD = "sequence_classification"
KINDS = {
    "seq2seq_lm": Kind(
        "seq2seq_lm",
        "t5",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "decoder_start_token_id": 2},
        ("q", "v", "wo"),
        AutoModelForSeq2SeqLM,
    ),
    "speech_seq2seq": Kind(
        "speech_seq2seq",
        "whisper",
        {
            **{"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16},
            **{"decoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 5, "max_target_positions": 32},
            **{"encoder_layers": 1, "decoder_layers": 2},
        },
        ("q_proj", "v_proj", "fc1"),
        AutoModelForSpeechSeq2Seq,
    ),
    "masked_lm": Kind(
        "masked_lm",
        "bert",
        BERT,
        ("query", "value"),
        AutoModelForMaskedLM,
        options={"prompt_template": "{input} <mask>"},
    ),
    HEAD: Kind(HEAD, "bert", BERT, ("query", "value", "dense"), num_labels=3),
    "two-layer head": Kind(HEAD, "roberta", BERT, ("query", "value"), num_labels=3),
    "head of a decoder": Kind(
        HEAD, "llama", {**BERT, "num_key_value_heads": 1}, ("q_proj", "o_proj", "down_proj"), num_labels=3
    ),
    "two modules as head": Kind(
        HEAD, "distilbert", {"dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 2}, ("q_lin", "v_lin"), num_labels=3
    ),
    "token_classification": Kind("token_classification", "bert", BERT, ("query", "value"), num_labels=3),
}


def tokenizer(before: str = "<s>", behind: str = "</s>") -> PreTrainedTokenizerFast:
    """One token a character, between special tokens; spaces count only between words."""
    words = [*SPECIAL.values(), *"abcdefghijklmnopqrstuvwxyz", *" ->\n:,", "1", "2"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    around = [(word, words.index(word)) for word in (before, behind) if word]
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(word for word in (before, "$A", behind) if word), special_tokens=around
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def whisper_processor() -> WhisperProcessor:
    """Whisper's own classes: bytes as tokens, half a second of sound as ten frames of eight numbers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|es|>", "<|translate|>"]
    names += ["<|transcribe|>", "<|nospeech|>", "<|notimestamps|>"]
    made = WhisperTokenizer(vocab={word: i for i, word in enumerate(alphabet)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": names})
    ears = WhisperFeatureExtractor(feature_size=8, sampling_rate=16000, hop_length=1600, chunk_length=1, n_fft=256)
    return WhisperProcessor(ears, made)


@cache
def folder(kind: str, **sizes: int) -> Path:
    """The base of a kind, as `from_pretrained` reads it, with other `sizes` if any; a base for a head comes without one."""
    how, where = KINDS[kind], temporary_folder() / "base"
    if how.objective == "speech_seq2seq":
        processor = whisper_processor()
        words = processor.tokenizer
        start = words.convert_tokens_to_ids("<|startoftranscript|>")
        ids = {
            "bos_token_id": words.eos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        }
        ids |= {"vocab_size": len(words), "decoder_start_token_id": start}
    else:
        processor = tokenizer(before="" if how.objective == "seq2seq_lm" else "<s>")
        ids = {**IDS, "vocab_size": 40}
    torch.manual_seed(0)
    made = AutoConfig.for_model(how.model_type, **{"initializer_range": 0.2, **ids, **how.sizes, **sizes})
    how.loaded_with.from_config(made).save_pretrained(where)
    processor.save_pretrained(where)
    return where


def arguments(kind: str, **options: Any) -> ModelArguments:
    how = KINDS[kind]
    given = {
        "objective": how.objective,
        "num_labels": how.num_labels,
        "lora_target_modules": list(how.targets),
        "new_head": "random",
    }
    return ModelArguments(str(folder(kind)), **{**given, "lora_r": 2, **options})


def peft_model(kind: str, **options: Any) -> PeftModel:
    made = arguments(kind, **options)
    torch.manual_seed(0)  # the head and the LoRA A matrices start at random
    base = load_base(made)
    return with_adapter(base, lora(kind, made))


def lora(kind: str, made: ModelArguments) -> LoraConfig:
    return lora_config(made, KINDS[kind].objective)


def processor(kind: str) -> Any:
    return load_tokenizer(str(folder(kind)), objective=KINDS[kind].objective)


def rows(kind: str, letter: str, n: int = 6) -> list[dict[str, Any]]:
    """A task that is named by a letter."""
    how, texts = KINDS[kind], [row["input"] for row in letter_rows(letter, n)]
    if how.objective == "speech_seq2seq":
        rng = np.random.default_rng(ord(letter))
        sounds = rng.normal(size=(n, 1000)).astype(np.float32)
        return [
            {"audio": {"array": s.tolist(), "sampling_rate": 16000}, "text": f"{letter}{i}"}
            for i, s in enumerate(sounds)
        ]
    if how.objective == "token_classification":
        return [{"tokens": [t, t[::-1], letter], "tags": ["x", "y", "z"]} for t in texts]
    if how.objective == HEAD:
        return [{"text": t, "label": "yes" if i % 2 else "no"} for i, t in enumerate(texts)]
    return [{"input": t, "target": letter * (1 + i % 2)} for i, t in enumerate(texts)]


def tasks(kind: str, letters: str = LETTERS) -> dict[str, list[dict[str, Any]]]:
    return {f"task {letter}": rows(kind, letter) for letter in letters}


def trainer(kind: str, output: Path, **options: Any) -> MetaTrainer:
    return MetaTrainer(
        peft_model(kind),
        config(output, **{**KINDS[kind].options, **options}),
        train_dataset=tasks(kind),
        eval_dataset=tasks(kind, "ef"),
        processing_class=processor(kind),
    )
