from __future__ import annotations

import numpy as np
import pytest
from datasets import Audio, Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import TaskSet
from meta_peft.tasks.sound import one_channel

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


def test_channels_are_one():
    """They come first, as `datasets` decodes them."""
    np.testing.assert_array_equal(one_channel(np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])), [0.5, 1.0, 1.0])
    np.testing.assert_array_equal(one_channel(np.array([0.0, 1.0])), [0.0, 1.0])
    assert one_channel(np.ones((1, 5))).shape == (5,)


@pytest.mark.parametrize("channels", [1, 2])
def test_channels_last(channels: int):
    """As soundfile reads them: they would be a sound of as many samples as there are channels."""
    with pytest.raises(MetaPeftError, match=rf"channels first.* shape \(5, {channels}\).* array.mean\(1\)"):
        one_channel(np.ones((5, channels)))


@pytest.mark.parametrize("sound", [3, [0.0, 0.5], {"array": [0.0]}])
def test_what_is_no_sound(sound):
    with pytest.raises(MetaPeftError, match="The column 'audio' must hold paths of sound files, or objects"):
        TaskSet.from_rows([{"task": "a", "audio": sound, "text": "one"}])


def test_sound_without_a_text():
    with pytest.raises(MetaPeftError, match="Row 2 has nothing in the column 'text'"):
        TaskSet.from_rows([{"task": "a", "audio": "a.wav", "text": t} for t in ("one", None)])
