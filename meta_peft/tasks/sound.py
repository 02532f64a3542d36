"""What a column of sound may hold, and a sound of several channels as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Audio, Value

from meta_peft.errors import MetaPeftError
from meta_peft.utils.checked import shown

STORED = ({"array", "sampling_rate"}, {"bytes"}, {"path"})  # objects have at least one of these sets of keys


def check_sound(features: Mapping[str, Any]) -> None:
    """Raise unless the column `audio` holds paths, or sound as `datasets` and `transformers` keep it."""
    kind = features["audio"]
    if isinstance(kind, Audio) or (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
        return
    if not isinstance(kind, Mapping) or not any(keys <= set(kind) for keys in STORED):
        raise MetaPeftError(
            "The column 'audio' must hold paths of sound files, or objects with array and sampling_rate, with bytes or with"
            f" path; it holds {shown(kind)}."
        )


def one_channel(array: np.ndarray) -> np.ndarray:
    """The mean of the channels of a sound ``[channels, n]``; one without channels, ``[n]``, as it is.

    Raises:
        MetaPeftError: there are more channels than samples, as where channels come last.
    """
    if array.ndim != 2:
        return array
    if array.shape[0] > array.shape[1] > 0:
        raise MetaPeftError(
            f"A sound of several channels must have its channels first, [channels, samples]; got an array of shape"
            f" {array.shape}. Give its transpose, or one channel: array.mean(1)."
        )
    mean: np.ndarray = array.mean(0)
    return mean
