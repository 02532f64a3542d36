"""What a column of sound may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
