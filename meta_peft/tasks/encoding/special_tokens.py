"""What a tokenizer puts around a text by itself."""

from __future__ import annotations

from typing import Any


def special_tokens(tokenizer: Any, *, of: str = "text") -> tuple[list[int], list[int]]:
    """The tokens before and behind a text that is read (`text`), or one that is to be written (`text_target`)."""
    bare = tokenizer(**{of: "a"}, add_special_tokens=False)["input_ids"]
    whole = tokenizer(**{of: "a"})["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]
