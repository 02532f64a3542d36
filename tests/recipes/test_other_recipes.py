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


@pytest.mark.parametrize(
    ("recipe", "kind", "head", "options"),
    [
        ("encoder_classification", kinds.HEAD, "classifier", []),
        ("decoder_classification", "head of a decoder", "score", ["--load_in_4bit", "false"]),
    ],
)
def test_classes_under_a_head(
    recipe: str, kind: str, head: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    glosses = {number: [f"a kind of {word} {number}" for word in words(60)] for number in text_classification.KINDS}
    splits = text_classification.tasks_of(wordnet_archive(tmp_path, glosses), 0)
    few = {part: dict(list(tasks.items())[:4]) for part, tasks in splits.items()}
    write(Path("data/text_classification"), few, "# Source")
    losses = take_two_steps(recipe, kinds.folder(kind), monkeypatch, *options, "--lora_layers", "0", "1")
    assert all(1 < loss < 5 for loss in losses)  # of four classes
    weights = load_file("out/adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)
    assert weights[f"base_model.model.{head}.weight"].shape == (5, 16)


def test_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    said = {f"digits/{word}": word for word in words(40)}
    for language in ("en", "fr", "ru", "it", "es"):
        sounds = {name: wav(0.5, pitch=300 + 10 * i) for i, name in enumerate(said)}
        asterisk_debs(tmp_path, language, said, sounds)
    assert speech.main(["--debs", "."]) == 0
    base = kinds.folder("speech_seq2seq", decoder_layers=4)  # as many as the recipe names
    losses = take_two_steps("speech", base, monkeypatch)
    assert all(0 < loss < 20 for loss in losses)
    weights = load_file("out/adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)
