"""What each kind of model reads and answers, token by token."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import folder, processor, rows, tokenizer, whisper_processor

from meta_peft import MetaPeftError, PromptFormat, TaskSet
from meta_peft.base import load_base
from meta_peft.config import ModelArguments
from meta_peft.tasks.encoding import Encoding, Facts
from meta_peft.tasks.encoding.speech_seq2seq import samples

FORMAT = PromptFormat("{input}:", "{target}")


def encoding(objective: str, max_length: int = 32, *, prompt: str = "{input}:", **facts: Any) -> Encoding:
    words = whisper_processor() if objective == "speech_seq2seq" else tokenizer()
    return Encoding(objective, PromptFormat(prompt, "{target}"), words, max_length, Facts(**facts))


def text(how: Encoding, ids: list[int]) -> str:
    return how.tokenizer.decode([i for i in ids if i != -100]) if len(ids) else ""


# ---- text


def test_causal_lm_is_prompt_and_completion():
    how = encoding("causal_lm")
    row = {"input": "ab", "target": "cd"}
    features = how(row)
    assert features == FORMAT.encode(row, how.tokenizer, 32)
    assert text(how, features["input_ids"]) == "<s>ab:cd</s>"
    assert how.with_label(features, "e") == how({"input": "ab", "target": "e"})


def test_seq2seq_lm_reads_the_prompt_and_writes_the_completion():
    how = encoding("seq2seq_lm", decoder_prefix=(2,))
    features = how({"input": "ab", "target": "cd"})
    assert text(how, features["input_ids"]) == "<s>ab:</s>"
    assert text(how, features["labels"]) == "cd</s>"
    assert text(how, features["decoder_input_ids"]) == "<pad>cd"
    assert how.with_label(features, "e") == how({"input": "ab", "target": "e"})
    again = encoding("seq2seq_lm", decoder_prefix=(1, 0))({"input": "ab", "target": "cd"})  # as BART starts
    assert (text(how, again["decoder_input_ids"]), again["labels"][0]) == ("</s><s>cd", -100)
    assert len(again["decoder_input_ids"]) == len(again["labels"])


def test_decoder_inputs_are_those_that_the_model_makes_itself():
    base, words = load_base(ModelArguments(str(folder("seq2seq_lm")))), processor("seq2seq_lm")
    how = Encoding.of(base, "seq2seq_lm", FORMAT, words, 32)
    assert how.facts == Facts(decoder_prefix=(2,))
    features = how({"input": "ab", "target": "cd"})
    made = base.prepare_decoder_input_ids_from_labels(torch.tensor([features["labels"]]))
    assert made[0].tolist() == features["decoder_input_ids"]


@pytest.mark.parametrize("objective", ["seq2seq_lm", "masked_lm", "sequence_classification"])
def test_a_long_prompt_loses_its_start(objective: str):
    how = encoding(objective, 6, decoder_prefix=(2,), num_labels=2)
    target = 1 if objective == "sequence_classification" else "z"
    features = how({"input": "abcdefgh", "target": target})
    read = text(how, features["input_ids"])
    assert read == {"masked_lm": "<s>gh:<mask></s>"}.get(objective, "<s>fgh:</s>")


@pytest.mark.parametrize("objective", ["causal_lm", "seq2seq_lm", "masked_lm"])
def test_a_completion_that_does_not_fit(objective: str):
    how = encoding(objective, 6, decoder_prefix=(2,))
    with pytest.raises(MetaPeftError, match=r"A completion of \d+ tokens does not fit max_length=6"):
        how({"input": "ab", "target": "abcdefgh"})


@pytest.mark.parametrize("objective", ["seq2seq_lm", "masked_lm", "sequence_classification"])
def test_conversations_are_for_models_that_write_on(objective: str):
    with pytest.raises(MetaPeftError, match=f"Rows are conversations, which {objective} does not read"):
        encoding(objective, num_labels=2)({"messages": [{"role": "user", "content": "a"}]})


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("{input}:", "<s>ab:<mask><mask></s>"),
        ("{input} <mask>, it is", "<s>ab <mask><mask>, it is</s>"),
        ("<mask>: {input}", "<s><mask><mask>: ab</s>"),
    ],
)
def test_masked_lm_masks_the_completion(prompt: str, read: str):
    how = encoding("masked_lm", prompt=prompt)
    features = how({"input": "ab", "target": "cd"})
    ids, labels = features["input_ids"], features["labels"]
    assert text(how, ids) == read
    assert text(how, labels) == "cd"
    assert [i for i, label in enumerate(labels) if label != -100] == [i for i, t in enumerate(ids) if t == 4]
    for answer in ("e", "fgh"):
        assert how.with_label(features, answer) == how({"input": "ab", "target": answer})


def test_masks_are_kept_where_a_row_is_cut():
    how = encoding("masked_lm", 7, prompt="<mask>: {input}")
    assert text(how, how({"input": "abcdef", "target": "xy"})["input_ids"]) == "<s><mask><mask>: a</s>"
    with pytest.raises(MetaPeftError, match="names the mask token 2 times"):
        encoding("masked_lm", prompt="<mask> {input} <mask>")({"input": "a", "target": "b"})


def test_a_tokenizer_without_a_mask():
    words = tokenizer()
    words.mask_token = None
    with pytest.raises(MetaPeftError, match="has no mask token"):
        Encoding("masked_lm", FORMAT, words, 32)({"input": "a", "target": "b"})


# ---- classes


def test_sequence_classification():
    how = encoding("sequence_classification", num_labels=3)
    features = how({"text": "ab", "label": 2})
    assert (text(how, features["input_ids"]), features["labels"]) == ("<s>ab:</s>", [2])
    assert how.with_label(features, 1)["labels"] == [1]
    with pytest.raises(MetaPeftError, match=r"class 3, and the head has the classes 0 to 2: set num_labels"):
        how({"text": "ab", "label": 3})
    with pytest.raises(MetaPeftError, match=r"must be the name of a class or its number; got 0\.5"):
        how({"text": "ab", "label": 0.5})
    with pytest.raises(MetaPeftError, match=r"Label 'bad' is none of the 0 known classes"):
        how({"text": "ab", "label": "bad"})


def test_token_classification_labels_the_first_token_of_a_word():
    how = encoding("token_classification", num_labels=3)
    features = how({"tokens": ["ab", "c"], "tags": [2, 1]})
    assert text(how, features["input_ids"]) == "<s> ab c</s>"
    assert features["labels"] == [-100, 2, -100, -100, 1, -100, -100]
    assert how({"tokens": ["ab", "c"], "ner_tags": [2, 1]}) == features
    assert how.with_label(features, [0, 2])["labels"] == [-100, 0, -100, -100, 2, -100, -100]
    short = encoding("token_classification", 6, num_labels=3)({"tokens": ["ab", "c"], "tags": [2, 1]})
    assert text(how, short["input_ids"]) == "<s> ab</s>"
    assert short["labels"] == [-100, 2, -100, -100, -100]


@pytest.mark.parametrize(
    "row", [{"tokens": ["a"], "tags": [1, 0]}, {"tokens": "a", "tags": [1]}, {"tokens": [], "tags": []}, {"text": "a"}]
)
def test_words_without_as_many_classes(row: dict):
    with pytest.raises(MetaPeftError, match="Expected a column tokens with a list of words and a column tags"):
        encoding("token_classification", num_labels=3)(row)


def named(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"a{i}", "label": label} for i, label in enumerate(labels)]


def test_names_that_all_tasks_share_have_the_same_numbers():
    how = encoding("sequence_classification", num_labels=3).naming(["b", "c", "b", "a"])
    assert how.facts.label_names == ("a", "b", "c")
    assert how.of_task(named("c")) is how
    assert how({"text": "x", "label": "c"})["labels"] == [2]
    assert how({"text": "x", "label": 1})["labels"] == [1]


def test_names_that_are_a_task_s_own_are_numbered_by_task():
    how = encoding("sequence_classification", num_labels=2).naming(["a", "b", "c", "d"])
    assert how.facts.label_names == ()
    tasks = TaskSet.from_mapping({"one": named("b", "a", "b"), "other": named("c", "d", "c")}).encoded(how)
    assert [[row["labels"] for row in tasks.rows(name)] for name in tasks.names] == [[[1], [0], [1]], [[0], [1], [0]]]
    with pytest.raises(MetaPeftError, match=r"3 names of classes.*the head has 2 classes: set num_labels"):
        how.of_task(named("a", "b", "c"))


def test_a_number_that_may_be_a_name():
    """Names that are digits were text in training, of a CSV file for one: the number 1 may be the name "1" or class 1."""
    how = encoding("token_classification", num_labels=3, label_names=("1", "2", "3"))
    row = {"tokens": ["a", "b"], "tags": ["1", "3"]}
    features = how(row)
    assert how(row | {"tags": [0, 0]})["labels"].count(0) == 2, "no name"
    with pytest.raises(MetaPeftError, match=r"A label is the number 1, .*\['1', '2', '3'\].*: give it as text, '1'"):
        how(row | {"tags": [0, np.int64(1)]})
    with pytest.raises(MetaPeftError, match="A label is the number 3"):
        how(row | {"tags": [3, 0]})
    assert how.with_label(features, [1, 2])["labels"] == how(row | {"tags": ["2", "3"]})["labels"], "numbers of classes"
    of_rows = encoding("sequence_classification", num_labels=3, label_names=("1", "2", "3"))
    with pytest.raises(MetaPeftError, match="A label is the number 2"):
        of_rows({"text": "a", "label": 2})
    assert of_rows.with_label(of_rows({"text": "a", "label": "1"}), 1) == of_rows({"text": "a", "label": "2"})
    either = encoding("token_classification", num_labels=3, label_names=("0", "1", "x"))
    assert either(row | {"tags": [0, 1]}) == either(row | {"tags": ["0", "1"]})


def test_numbers_have_no_names():
    how = encoding("token_classification", num_labels=3).naming([[0, 1], [2]])
    assert how.of_task([{"tokens": ["a"], "tags": [1]}]).facts.label_names == ()


# ---- sound


def sound(n: int = 1000, rate: int = 16000, **other: Any) -> dict[str, Any]:
    return {"audio": {"array": np.sin(np.arange(n) / 3), "sampling_rate": rate}, "text": "hola", **other}


def speech(language: str | None = "spanish") -> Encoding:
    base, ears = load_base(ModelArguments(str(folder("speech_seq2seq")))), processor("speech_seq2seq")
    if language:
        ears.tokenizer.set_prefix_tokens(language=language, task="transcribe")
    return Encoding.of(base, "speech_seq2seq", FORMAT, ears, 32)


def test_speech_seq2seq_hears_and_writes_behind_the_tokens_of_its_language():
    how = speech()
    features = how(sound())
    assert features["input_features"].shape == (8, 10)
    expected = how.processor(np.sin(np.arange(1000) / 3), sampling_rate=16000)["input_features"][0]
    np.testing.assert_array_equal(features["input_features"], expected)
    start = "<|startoftranscript|><|es|><|transcribe|><|notimestamps|>"
    assert text(how, features["decoder_input_ids"]) == f"{start}hola"
    assert text(how, features["labels"]) == "hola<|endoftext|>"
    assert features["labels"][:3] == [-100] * 3
    changed = how.with_label(features, "adios")
    assert text(how, changed["labels"]) == "adios<|endoftext|>"
    assert changed["input_features"] is features["input_features"]


def test_the_language_stays_with_the_facts():
    """An adapter that was learned in one language goes on in it, whatever its processor says by itself."""
    how, other = speech(), speech(None)
    assert how.facts != other.facts
    again = Encoding("speech_seq2seq", FORMAT, other.processor, 32, how.facts)
    assert again(sound())["decoder_input_ids"] == how(sound())["decoder_input_ids"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (sound(rate=8000), r"8000 samples a second, the model hears 16000. Let datasets resample it"),
        (sound(16001), r"A sound of 1\.0 s is longer than the 1 s that the model hears: cut it"),
        (sound(0), "a list of finite samples, at least one"),
        ({"audio": {"array": np.ones((9, 2)), "sampling_rate": 16000}, "text": "a"}, "must have its channels first"),
        ({"audio": {"array": [float("nan")], "sampling_rate": 16000}, "text": "a"}, "a list of finite samples"),
        ({"audio": 3, "text": "a"}, "must hold an array and a sampling_rate, or the path of a WAV file; got 3"),
        ({"audio": "none.mp3", "text": "a"}, "none.mp3 cannot be read as a WAV file"),
        (sound(text=" "), "must hold the transcript of the sound; got ' '"),
        ({"text": "a"}, "Expected columns audio and one of sentence, text, transcription"),
    ],
)
def test_sounds_that_are_refused(row: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        speech()(row)


def test_a_tokenizer_alone_hears_nothing():
    how = speech()
    deaf = Encoding("speech_seq2seq", FORMAT, how.tokenizer, 32, how.facts)
    with pytest.raises(MetaPeftError, match="A speech model needs its processor"):
        deaf(sound())


def test_a_wav_file(tmp_path: Path):
    wanted = (np.sin(np.arange(100)) * 2**14).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.stack([wanted, wanted], 1).tobytes())
    array, rate = samples(str(tmp_path / "a.wav"))
    assert rate == 16000
    np.testing.assert_array_equal(array, wanted / np.float32(2**15))
    stereo, _ = samples({"array": np.ones((2, 5)), "sampling_rate": 8000})  # channels first, as datasets decodes
    assert stereo.shape == (5,)


def test_features_of_sound_come_back_as_arrays():
    tasks = TaskSet.from_mapping({"a": rows("speech_seq2seq", "a", 2)}).encoded(speech())
    row = tasks.rows("a")[0]
    assert isinstance(row["input_features"], np.ndarray)
    assert row["input_features"].shape == (8, 10)
    assert isinstance(row["labels"], list)
