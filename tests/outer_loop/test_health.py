from __future__ import annotations

import pytest
import torch
from surface import letter_tasks, trainer, write_jsonl  # noqa: F401

from meta_peft.outer_loop.health import diverged, is_finite
from meta_peft.types import SUPPORT_LOSSES, Meta, MetaGradient


def gradient(losses: list[list[float]], value: float = 1.0) -> MetaGradient:
    found = torch.tensor(losses)
    grads = Meta({"a": torch.full((2, 2), value)}, {})
    return MetaGradient(grads, len(found), {"loss": found[:, -1], SUPPORT_LOSSES: found})


def test_uphill_is_twice_as_high_and_more():
    rows = {"down": [2.0, 1.0], "level": [1.0, 1.0], "a little": [1.0, 1.9], "tiny": [0.01, 0.1], "up": [1.0, 2.2]}
    rows |= {"there and back": [1.0, 9.0], "no number": [1.0, float("nan")]}
    assert diverged(gradient(list(rows.values())), list(rows)) == ["up", "there and back", "no number"]
    three = gradient([[1.0, 9.0, 0.5]])
    assert diverged(three, ["there and back"]) == []


def test_without_an_inner_loop_nothing_diverges():
    assert diverged(MetaGradient(Meta({}, {}), 2, {"loss": torch.ones(2)}), ["a", "b"]) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite(bad: float):
    assert is_finite(gradient([[1.0]]))
    assert not is_finite(gradient([[1.0]], bad))
    assert not is_finite(gradient([[bad]]))
