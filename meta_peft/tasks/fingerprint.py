"""What an encoding is, in a few letters that are the same in every run: the name that encoded rows are kept by.

`datasets` hashes what a tokenizer pickles to, which changes when it is first used; here it is what the tokenizer does.
The code that encodes counts too: a new version of it must not find what an old one made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from meta_peft.utils import digests


def fingerprint(*values: Any) -> str | None:
    """A hash of `values`; None if one of them is not known to be described by its parts."""
    known: dict[int, str | None] = {}
    parts = [_described(value, known) for value in values]
    if None in parts:
        return None
    return digests.of_texts(digest_of_code(), *map(str, parts))


def _described(value: Any, known: dict[int, str | None]) -> str | None:
    """What `value` is; `known` has what was found before, by identity: many encodings share one tokenizer."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return repr(value)
    if isinstance(value, Mapping):
        return _of_parts(value, known)
    if isinstance(value, (list, tuple)):
        return _of_parts({str(i): part for i, part in enumerate(value)}, known)
    if is_dataclass(value) and not isinstance(value, type):
        return _of_parts({"": type(value).__name__, **{f.name: getattr(value, f.name) for f in fields(value)}}, known)
    if id(value) not in known:
        known[id(value)] = _of_processor(value, known)
    return known[id(value)]


def _of_processor(value: Any, known: dict[int, str | None]) -> str | None:
    """Of a tokenizer, or of a processor of sound."""
    if hasattr(value, "backend_tokenizer"):
        special = ("bos_token", "eos_token", "pad_token", "chat_template")
        parts = {name: getattr(value, name, None) for name in special}
        # Padding and truncation are what the last caller asked for; who encodes asks anew.
        does = {**json.loads(value.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        return _of_parts({"": type(value).__name__, "tokenizer": json.dumps(does), **parts}, known)
    if hasattr(value, "tokenizer") and hasattr(value, "feature_extractor"):
        extractor = value.feature_extractor.to_json_string()
        return _of_parts({"tokenizer": value.tokenizer, "feature_extractor": extractor}, known)
    return None


def _of_parts(parts: Mapping[str, Any], known: dict[int, str | None]) -> str | None:
    described = {name: _described(part, known) for name, part in parts.items()}
    if None in described.values():
        return None
    return digests.of_texts("parts", *(f"{name}={part}" for name, part in described.items()))


@cache
def digest_of_code() -> str:
    """Of everything that makes rows and features: what an older version made is not found again."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return digests.of_texts(*(file.read_text(encoding="utf-8") for file in files))
