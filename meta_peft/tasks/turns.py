"""Turns of conversations that say nothing: a chat template would write the word None, or an answer of no words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASSISTANT = "assistant"
CALLS = ("tool_calls", "function_call")  # what an assistant may answer with in place of content


def empty_turn(turns: Any) -> Mapping[str, Any] | None:
    """The first of a conversation's turns that says nothing: without content, or the assistant's with an empty one.

    What is no conversation has none: that is for whoever reads it.
    """
    return next((turn for turn in turns if _says_nothing(turn)), None) if isinstance(turns, list) else None


def _says_nothing(turn: Any) -> bool:
    if not isinstance(turn, Mapping) or "role" not in turn or any(turn.get(call) for call in CALLS):
        return False
    content = turn.get("content")
    return content is None or (turn["role"] == ASSISTANT and not _has_something(content))


def _has_something(content: Any) -> bool:
    """Content is a text, or a list of parts, of which those of text have one."""
    if not isinstance(content, list):
        return bool(content)
    return any(not isinstance(part, Mapping) or part.get("type") != "text" or part.get("text") for part in content)
