"""The encoder hears a sound, the decoder writes its transcript (Whisper)."""

from __future__ import annotations

import wave
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoding.decoder import answer
from meta_peft.tasks.prompt import SOUND
from meta_peft.tasks.sound import one_channel
from meta_peft.utils.checked import shown

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def encode(row: Mapping[str, Any], how: Encoding) -> dict[str, Any]:
    """`input_features` ``[mel, frames]``; `decoder_input_ids` and `labels` ``[L]``."""
    said = next((column for _, column in SOUND if {"audio", column} <= row.keys()), None)
    if said is None:
        names = ", ".join(column for _, column in SOUND)
        raise MetaPeftError(
            f"Expected columns audio and one of {names}; the columns are {sorted(row)}. Rename yours to these."
        )
    if not isinstance(row[said], str) or not row[said].strip():
        raise MetaPeftError(f"Column {said!r} must hold the transcript of the sound; got {shown(row[said])}.")
    return {"input_features": _heard(*samples(row["audio"]), how), **answer(row[said], how)}


def with_label(features: Mapping[str, Any], label: str, how: Encoding) -> dict[str, Any]:
    return {**features, **answer(label, how)}


def samples(audio: Any) -> tuple[np.ndarray, int]:
    """The samples ``[n]`` from -1 to 1 and their rate: of a dict or what `datasets.Audio` decodes, or of a WAV file."""
    if isinstance(audio, (str, Path)):
        return _read_wav(Path(audio))
    try:
        array, rate = np.asarray(audio["array"], dtype=np.float32), audio["sampling_rate"]
    except (TypeError, KeyError, ValueError) as error:
        raise MetaPeftError(
            f"Column 'audio' must hold an array and a sampling_rate, or the path of a WAV file; got {shown(audio)}."
        ) from error
    array = one_channel(array)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise MetaPeftError(
            f"A sound must be a list of finite samples, at least one; got an array of shape {array.shape}."
        )
    return array, int(rate)


def _read_wav(path: Path) -> tuple[np.ndarray, int]:
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise MetaPeftError(
            f"{path} cannot be read as a WAV file ({error}): convert it, or give a datasets.Dataset whose column has"
            " the type Audio, which decodes other formats."
        ) from error
    if width != 2 or not content:
        raise MetaPeftError(f"{path} must hold samples of 16 bits, at least one; it has {8 * width} bits. Convert it.")
    return np.frombuffer(content, "<i2").reshape(-1, channels).mean(1).astype(np.float32) / 2**15, rate


def _heard(array: np.ndarray, rate: int, how: Encoding) -> np.ndarray:
    extractor = getattr(how.processor, "feature_extractor", None)
    if extractor is None:
        raise MetaPeftError(
            "A speech model needs its processor, which makes features of sound: give AutoProcessor.from_pretrained(...) as"
            " processing_class."
        )
    if rate != extractor.sampling_rate:
        raise MetaPeftError(
            f"The sound has {rate} samples a second, the model hears {extractor.sampling_rate}. Let datasets resample it:"
            f" dataset.cast_column('audio', Audio(sampling_rate={extractor.sampling_rate}))."
        )
    longest = getattr(extractor, "n_samples", None)
    if longest is not None and len(array) > longest:
        raise MetaPeftError(
            f"A sound of {len(array) / rate:.1f} s is longer than the {longest / rate:g} s that the model hears: cut it"
            " into parts, each with its own transcript."
        )
    found = extractor(array, sampling_rate=rate, return_tensors="np")
    if "input_features" not in found:
        raise MetaPeftError(
            f"{type(extractor).__name__} makes {sorted(found)}, not input_features: only models that hear like Whisper are"
            " supported."
        )
    features: np.ndarray = found["input_features"][0]
    return features
