"""The recipes for an encoder with a head and for speech, on tiny models of these kinds."""

from __future__ import annotations

from pathlib import Path

import kinds
import pytest
import speech
import text_classification
from family import write
from programs import asterisk_debs, wav, wordnet_archive, words
from safetensors.torch import load_file
from two_steps import take_two_steps


def test_encoder_classification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    glosses = {number: [f"a kind of {word} {number}" for word in words(60)] for number in text_classification.KINDS}
    splits = text_classification.tasks_of(wordnet_archive(tmp_path, glosses), 0, letters=True)
    few = {part: dict(list(tasks.items())[:4]) for part, tasks in splits.items()}
    write(Path("data/encoder_classification"), few, "# Source")
    losses = take_two_steps("encoder_classification", kinds.folder(kinds.HEAD), monkeypatch)
    assert all(1 < loss < 5 for loss in losses)  # of five classes
    weights = load_file("out/adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)


def test_decoder_classification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    glosses = {number: [f"a kind of {word} {number}" for word in words(60)] for number in text_classification.KINDS}
    splits = text_classification.tasks_of(wordnet_archive(tmp_path, glosses), 0)
    few = {part: dict(list(tasks.items())[:4]) for part, tasks in splits.items()}
    write(Path("data/text_classification"), few, "# Source")
    options = ["--load_in_4bit", "false", "--lora_layers", "0", "1"]
    losses = take_two_steps("decoder_classification", kinds.folder("head of a decoder"), monkeypatch, *options)
    assert all(1 < loss < 5 for loss in losses)
    weights = load_file("out/adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)
    assert weights["base_model.model.score.weight"].shape == (5, 16)


def test_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    said = {f"digits/{word}": word for word in words(40)}
    for language in ("en", "fr", "ru", "it", "es"):
        sounds = {name: wav(0.5, pitch=300 + 10 * i) for i, name in enumerate(said)}
        asterisk_debs(tmp_path, language, said, sounds)
    assert speech.main(["--debs", "."]) == 0
    losses = take_two_steps("speech", kinds.folder("speech_seq2seq"), monkeypatch)
    assert all(0 < loss < 20 for loss in losses)
    weights = load_file("out/adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)
