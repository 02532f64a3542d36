from __future__ import annotations

from typing import Any

import pytest

from meta_peft.tasks.turns import empty_turn

ASKED, SAID = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
CALL = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
        {"role": "user", "content": None},
        {"role": "system", "content": None, "tool_calls": None},
        {"role": "tool", "content": None},
    ],
)
def test_turns_that_say_nothing(turn: dict[str, Any]):
    """Wherever they stand."""
    assert empty_turn([ASKED, turn]) is turn
    assert empty_turn([turn, ASKED, SAID]) is turn


@pytest.mark.parametrize(
    "turn",
    [
        SAID,
        {"role": "user", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "assistant", "content": "", "function_call": CALL[0]["function"]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "image", "path": "a.png"}]},
    ],
)
def test_turns_that_say_something(turn: dict[str, Any]):
    assert empty_turn([ASKED, turn]) is None


@pytest.mark.parametrize("turns", [None, "", [], float("nan"), "one", ["one"], [{"from": "gpt", "value": None}]])
def test_what_is_no_conversation(turns: Any):
    assert empty_turn(turns) is None
