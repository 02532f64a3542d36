"""WAV files in, clips at the rate that Whisper hears out."""

from __future__ import annotations

import io
import os
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meta_peft.errors import MetaPeftError

RATE = 16_000  # samples a second


def samples_of(file: bytes) -> NDArray[np.float32]:
    """The samples of a WAV file with one channel of 16 bits, brought to 16 kHz."""
    try:
        with wave.open(io.BytesIO(file)) as wav:
            if (wav.getnchannels(), wav.getsampwidth()) != (1, 2):
                raise MetaPeftError("Expected sound with one channel of 16 bits: convert it, as with ffmpeg -ac 1.")
            rate, heard = wav.getframerate(), np.frombuffer(wav.readframes(wav.getnframes()), "<i2")
    except (wave.Error, EOFError) as error:
        raise MetaPeftError(f"Expected a WAV file: {error}.") from error
    return resampled(heard.astype(np.float32) / 2**15, rate, RATE)


def resampled(sound: NDArray[np.float32], rate: int, new_rate: int) -> NDArray[np.float32]:
    """The same sound at another rate: the same spectrum, up to what both rates can hold."""
    n = round(len(sound) * new_rate / rate)
    return (np.fft.irfft(np.fft.rfft(sound), n) * (n / len(sound))).astype(np.float32) if n else sound[:0]


def write_clip(sound: NDArray[np.float32], folder: Path, name: str) -> str:
    """Writes ``folder/clips/name`` aside and renames it; returns its path from `folder` on."""
    path = folder / "clips" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    with wave.open(str(aside), "wb") as wav:
        wav.setparams((1, 2, RATE, len(sound), "NONE", "not compressed"))
        wav.writeframes((np.clip(sound, -1, 1) * (2**15 - 1)).round().astype("<i2").tobytes())
    aside.replace(path)
    return path.relative_to(folder).as_posix()
