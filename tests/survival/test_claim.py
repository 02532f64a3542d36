from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from processes.forked import forked
from surface import trainer

from meta_peft.errors import MetaPeftError
from meta_peft.survival import claim
from meta_peft.survival.claim import Claim


def test_one_has_it_until_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claim, "PATIENCE", 0.2)
    folder = tmp_path / "new"
    with Claim(folder) as first:
        first.take()
        with (
            pytest.raises(MetaPeftError, match=r"Another run trains in .*new now, .* give each an output_dir"),
            Claim(folder) as second,
        ):
            second.take()
        with Claim(tmp_path) as another:
            another.take()
    with Claim(folder) as third:
        third.take()
    assert list(folder.iterdir()) == []


def test_who_comes_a_moment_too_early_waits(tmp_path: Path):
    first = Claim(tmp_path)
    first.take()
    threading.Timer(0.5, first.__exit__, (None, None, None)).start()
    began = time.monotonic()
    with Claim(tmp_path) as second:
        second.take()
    assert time.monotonic() - began > 0.3


def test_a_process_that_is_killed_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def hold() -> None:
        Claim(tmp_path).take()
        (tmp_path / "taken").touch()
        time.sleep(60)

    pid = forked(hold)
    while not (tmp_path / "taken").exists():
        time.sleep(0.05)
    monkeypatch.setattr(claim, "PATIENCE", 0.2)
    with pytest.raises(MetaPeftError, match="Another run"), Claim(tmp_path) as early:
        early.take()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with Claim(tmp_path) as free:
        free.take()


def test_a_file_system_without_locks_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(file: int, what: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "flock", flock)
    with Claim(tmp_path) as first, Claim(tmp_path) as second:
        first.take()
        second.take()


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claim, "PATIENCE", 0.2)
    run = trainer(tmp_path, max_steps=1)
    with Claim(tmp_path) as other:
        other.take()
        with pytest.raises(MetaPeftError, match="Another run trains in"):
            run.train()
        assert run.state.global_step == 0
    run.train()
    assert run.state.global_step == 1
