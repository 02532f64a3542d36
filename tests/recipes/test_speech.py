from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import recordings
import speech
from programs import asterisk_debs, rows_of, wav
from sound import resampled, samples_of

from meta_peft import MetaPeftError


def heard(path: Path) -> tuple[int, np.ndarray]:
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_a_tone_stays_a_tone_at_another_rate(rate: int):
    sound = samples_of(wav(0.5, rate=rate, pitch=440))  # whole periods
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    assert np.abs(sound - expected).max() < 1e-3


def test_what_the_new_rate_cannot_hold_is_gone():
    high = np.sin(2 * np.pi * 7000 * np.arange(16_000) / 16_000).astype(np.float32)
    assert np.abs(resampled(high, 16_000, 8000)).max() < 1e-4
    assert len(resampled(np.zeros(0, np.float32), 8000, 16_000)) == 0


@pytest.mark.parametrize(
    ("file", "said"), [(b"RIFF", "Expected a WAV file"), (wav(0.1, channels=2), "one channel of 16 bits")]
)
def test_other_sounds_are_refused(file: bytes, said: str):
    with pytest.raises(MetaPeftError, match=said):
        samples_of(file)


def prompts(folder: Path, language: str = "es", n: int = 40) -> tuple[Path, Path]:
    said = {f"digits/{i}": f"numero  {i}" for i in range(n)}
    said |= {"beep": "[tono simple]", "long": "mucho tiempo", "short": "no", "not-there": "nada"}
    sounds = {f"digits/{i}": wav(0.5) for i in range(n)} | {"beep": wav(0.5), "long": wav(9), "short": wav(0.1)}
    return asterisk_debs(folder, language, said, {**sounds, "without-words": wav(0.5)})


def test_prompts_become_tasks(tmp_path: Path):
    tasks = speech.tasks_of("es", *prompts(tmp_path), tmp_path / "made", 0)
    assert {name: len(rows) for name, rows in tasks.items()} == {"es 1": 16, "es 2": 16}
    rows = rows_of({"all": tasks})
    assert len({row["audio"] for row in rows}) == 32
    for row in rows:
        number = row["text"].removeprefix("numero ")
        assert row["audio"] == f"clips/es/digits-{number}.wav"
        rate, sound = heard(tmp_path / "made" / row["audio"])
        assert (rate, len(sound)) == (16_000, 8000)
    assert len(list((tmp_path / "made" / "clips" / "es").iterdir())) == 32  # nothing half-written, nothing more


def test_the_program_with_packages_in_a_folder(tmp_path: Path):
    for language in ("en", "fr", "ru", "it", "es"):
        prompts(tmp_path, language)
    made = tmp_path / "made"
    assert speech.main([str(made), "--debs", str(tmp_path)]) == 0
    lines = {part: (made / f"{part}.jsonl").read_text().splitlines() for part in ("train", "validation", "test")}
    assert {part: len(found) for part, found in lines.items()} == {"train": 96, "validation": 32, "test": 32}


def test_packages_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert speech.main([str(tmp_path / "made"), "--debs", str(tmp_path)]) == 2
    assert "There is no file asterisk-core-sounds-en_*.deb in" in capsys.readouterr().err
    (tmp_path / "no.deb").write_bytes(b"PK")
    with pytest.raises(MetaPeftError, match="is not a Debian package"):
        list(speech.members(tmp_path / "no.deb"))


def record(folder: Path, name: str, text: str | None) -> None:
    path = folder / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wav(0.5, rate=44_100))
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def test_own_recordings(tmp_path: Path):
    mine = tmp_path / "mine"
    record(mine, "train/anna/1", "Grüß  Gott\n")
    record(mine, "train/anna/2", "Servus")
    record(mine, "test/ben/1", "Moin")
    made = tmp_path / "made"
    assert recordings.main([str(made), "--from", str(mine)]) == 0
    splits = recordings.tasks_of(mine, made)
    assert splits["train"]["anna"][0] == {"audio": "clips/train/anna/1.wav", "text": "Grüß Gott"}
    assert {part: list(tasks) for part, tasks in splits.items()} == {
        "train": ["anna"],
        "validation": [],
        "test": ["ben"],
    }
    assert heard(made / "clips/test/ben/1.wav")[0] == 16_000


@pytest.mark.parametrize(("name", "text"), [("tset/anna/1", "Hallo"), ("train/anna/1", None)])
def test_recordings_that_are_not_where_they_should_be(tmp_path: Path, name: str, text: str | None):
    record(tmp_path, name, text)
    with pytest.raises(MetaPeftError, match="beside it, SPLIT one of train, validation, test"):
        recordings.tasks_of(tmp_path, tmp_path / "made")


def test_no_recordings(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="There is no recording in"):
        recordings.tasks_of(tmp_path, tmp_path / "made")
