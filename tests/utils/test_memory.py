from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from meta_peft.utils import memory
from meta_peft.utils.memory import available, ran_out

CPU = torch.device("cpu")


def outcome(action) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError, ValueError)) as caught:
        action()
    return caught.value


def test_an_allocation_that_fails_ran_out_of_memory():
    assert ran_out(outcome(lambda: torch.empty(2**45)))
    assert ran_out(outcome(lambda: torch.ones(1).expand(2**45).clone()))
    assert ran_out(outcome(lambda: np.empty(2**50)))
    assert ran_out(outcome(lambda: bytearray(2**60)))
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))


def test_other_errors_did_not():
    assert not ran_out(outcome(lambda: torch.ones(2) @ torch.ones(3)))
    assert not ran_out(outcome(lambda: torch.empty(-1)))
    assert not ran_out(outcome(lambda: int("memory")))
    assert not ran_out(KeyboardInterrupt())


def test_less_is_available_than_the_machine_has():
    assert 0 < available(CPU) <= psutil.virtual_memory().total


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the system's, for what a container may use."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\nfile 500000\n")
    return tmp_path


def test_a_container_may_be_allowed_less_than_the_machine_has(container: Path):
    assert available(CPU) == 3_000_000


def test_files_in_the_cache_count_as_available(container: Path):
    """The system counts them as used memory of the container: after a model is read, that can be most of it."""
    (container / "memory.stat").write_text("anon 1500000\nfile 500000\ninactive_file 400000\nactive_file 100000\n")
    assert available(CPU) == 3_400_000


@pytest.mark.parametrize("limit", ["max\n", "not a number\n", str(2**60), None])
def test_without_a_limit_below_it_it_is_what_the_machine_has(container: Path, limit: str | None):
    if limit is None:
        (container / "memory.max").unlink()
    else:
        (container / "memory.max").write_text(limit)
    assert 50_000_000 < available(CPU) <= psutil.virtual_memory().total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_what_it_has_free_and_what_torch_keeps():
    device = torch.device("cuda", torch.cuda.current_device())
    before = available(device)
    block = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    assert before - available(device) == pytest.approx(64 << 20, abs=8 << 20)
    del block  # kept by torch, and there for the next tensor
    assert available(device) == pytest.approx(before, abs=8 << 20)
