from __future__ import annotations

import pytest
from datasets import Audio, Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import TaskSet

WAVE = {"array": [0.0, 0.5], "sampling_rate": 16_000}


@pytest.mark.parametrize("sound", ["a.wav", WAVE, {"bytes": b"RIFF", "path": None}, {"path": "a.wav"}])
@pytest.mark.parametrize("text", ["sentence", "text", "transcription"])
def test_sound_with_what_is_said(sound, text: str):
    rows = [{"speaker": "a", "audio": sound, text: said} for said in ("one", "two", "one")]
    tasks = TaskSet.from_rows(rows, "speaker")
    assert [row[text] for row in tasks.rows("a")] == ["one", "two"]


def test_sound_is_not_decoded_to_find_tasks():
    """The files need not even be there."""
    table = Dataset.from_dict({"audio": ["no.wav", "none.wav"], "text": ["one", "two"], "speaker": ["a", "b"]})
    assert TaskSet(table.cast_column("audio", Audio()), "speaker").names == ["a", "b"]


@pytest.mark.parametrize("sound", [3, [0.0, 0.5], {"array": [0.0]}])
def test_what_is_no_sound(sound):
    with pytest.raises(MetaPeftError, match="The column 'audio' must hold paths of sound files, or objects"):
        TaskSet.from_rows([{"task": "a", "audio": sound, "text": "one"}])


def test_sound_without_a_text():
    with pytest.raises(MetaPeftError, match="Row 2 has nothing in the column 'text'"):
        TaskSet.from_rows([{"task": "a", "audio": "a.wav", "text": t} for t in ("one", None)])
