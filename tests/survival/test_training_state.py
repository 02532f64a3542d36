from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from meta_peft import MetaPeftError
from meta_peft.survival import training_state


def test_every_bit_comes_back(tmp_path: Path):
    values = {
        "floats": [0.1, 1e-300, -0.0, float("inf"), 1 / 3],
        "numbers": {0: 2**70, 1: None, "words": "ä\n", "yes": True},
        "tensors": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).double()}, 1: torch.tensor(7)}
        },
        "view": torch.arange(6.0).view(2, 3).T,
        "numpy": np.float64(0.1),
        "pair": (1, 2),
    }
    training_state.save(tmp_path, values)
    found = training_state.load(tmp_path)
    assert found["floats"] == values["floats"]
    assert str(found["floats"][2]) == "-0.0"
    assert found["numbers"] == values["numbers"]
    assert found["numpy"] == 0.1
    assert found["pair"] == [1, 2]
    inner = found["tensors"]["state"]
    assert torch.equal(inner[0]["exp_avg"], values["tensors"]["state"][0]["exp_avg"])
    assert inner[1].dtype == torch.int64
    assert torch.equal(found["view"], values["view"])


def test_what_cannot_be_held_is_named(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="has a function at /schedule/0/f, which a checkpoint cannot hold"):
        training_state.save(tmp_path, {"schedule": [{"f": lambda: 0}]})


@pytest.mark.parametrize("damage", ["missing", "json", "tensors"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, damage: str):
    training_state.save(tmp_path, {"a": torch.ones(2)})
    if damage == "missing":
        (tmp_path / training_state.JSON).unlink()
    elif damage == "json":
        (tmp_path / training_state.JSON).write_text(json.dumps({"dict": [["a", {"tensor": "/b"}]]}))
    else:
        (tmp_path / training_state.TENSORS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(MetaPeftError, match="has no training state that can be read"):
        training_state.load(tmp_path)


def test_random_numbers_go_on(tmp_path: Path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(2).tolist()]

    draw()
    training_state.save(tmp_path, training_state.random_numbers())
    expected = draw()
    draw()
    training_state.set_random_numbers(training_state.load(tmp_path))
    assert draw() == expected


def test_an_optimizer_goes_on_with_the_same_bits(tmp_path: Path):
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1, "betas": (0.8, 0.9)}])
        return p, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def advance(p, optimizer, schedule) -> None:
        p.grad = p.detach() ** 2 + 0.1
        optimizer.step()
        schedule.step()

    p, optimizer, schedule = make()
    advance(p, optimizer, schedule)
    training_state.save(tmp_path, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    q, other, other_schedule = make()
    q.data.copy_(p.data)
    values = training_state.load(tmp_path)
    other.load_state_dict(values["optimizer"])
    other_schedule.load_state_dict(values["schedule"])
    for _ in range(3):
        advance(p, optimizer, schedule)
        advance(q, other, other_schedule)
    assert torch.equal(p, q)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
