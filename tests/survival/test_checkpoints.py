from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from meta_peft import MetaPeftError
from meta_peft.survival import checkpoints, training_state


def make(parent: Path, step: int, text: str = "weights") -> Path:
    folder = parent / f"checkpoint-{step}"

    def fill(partial: Path) -> None:
        (partial / "adapter.bin").write_text(text)
        (partial / "inside").mkdir()
        (partial / "inside" / "more.json").write_text("{}")

    checkpoints.write(folder, fill)
    return folder


def test_a_whole_checkpoint(tmp_path: Path):
    folder = make(tmp_path, 3)
    checkpoints.check(folder)
    assert set(json.loads((folder / checkpoints.MANIFEST).read_text())) == {"adapter.bin", "inside/more.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoints.newest_whole(tmp_path) == folder


def test_the_same_step_again_replaces_it(tmp_path: Path):
    make(tmp_path, 3, "old")
    folder = make(tmp_path, 3, "new")
    assert (folder / "adapter.bin").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_error_while_writing_leaves_the_old_one(tmp_path: Path):
    folder = make(tmp_path, 3, "old")

    def fails(partial: Path) -> None:
        (partial / "adapter.bin").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        checkpoints.write(folder, fails)
    assert (folder / "adapter.bin").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"], "what was half written takes no room"
    assert checkpoints.newest_whole(tmp_path) == folder


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_between_any_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int):
    """A process that dies stops at some rename; the next one finds a whole checkpoint, of the old text or the new one."""
    make(tmp_path, 3, "old")
    done = []
    rename = os.replace

    def killed(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", killed)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, 3, "new")
    else:
        make(tmp_path, 3, "new")
    monkeypatch.undo()
    found = checkpoints.to_resume(True, tmp_path)
    assert found is not None
    assert (found / "adapter.bin").read_text() == ("new" if renames == 2 else "old")
    make(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def damaged_text(folder: Path) -> None:
    (folder / "adapter.bin").write_text("weighty")


def damaged_length(folder: Path) -> None:
    (folder / "adapter.bin").write_text("w")


def damaged_missing(folder: Path) -> None:
    (folder / "inside" / "more.json").unlink()


def damaged_manifest(folder: Path) -> None:
    (folder / checkpoints.MANIFEST).write_text('{"adapter.bin": 3}')


def damaged_no_manifest(folder: Path) -> None:
    (folder / checkpoints.MANIFEST).unlink()


DAMAGES = {
    damaged_text: "adapter.bin has another content than was written",
    damaged_length: "adapter.bin has 1 bytes instead of 7",
    damaged_missing: "more.json is missing",
    damaged_manifest: "files.json is missing or damaged",
    damaged_no_manifest: "files.json is missing or damaged",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_done_to_it_shows(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage):
    old, new = make(tmp_path, 9), make(tmp_path, 10)
    damage(new)
    with pytest.raises(MetaPeftError, match=DAMAGES[damage]):
        checkpoints.check(new)
    with caplog.at_level(logging.WARNING, logger="meta_peft"):
        assert checkpoints.newest_whole(tmp_path) == old
    assert "checkpoint-10" in caplog.text
    assert "It is passed over" in caplog.text


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path):
    for step in (10, 9, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-1000x").mkdir()
    found = checkpoints.newest_whole(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-100"
    assert checkpoints.newest_whole(tmp_path / "nowhere") is None


def test_what_to_resume_from(tmp_path: Path):
    def resume(asked):
        return checkpoints.to_resume(asked, tmp_path)

    assert resume(None) is None
    assert resume(False) is None
    for asked in (True, "True"):
        with pytest.raises(MetaPeftError, match="There is no whole checkpoint in"):
            resume(asked)
    folder = make(tmp_path, 5)
    assert resume(None) is None
    assert resume("false") is None
    assert [resume(True), resume("true"), resume(str(folder))] == [folder] * 3
    with pytest.raises(MetaPeftError, match="is no whole checkpoint"):
        resume(str(tmp_path / "checkpoint-6"))
    assert [path.name for path in tmp_path.iterdir()] == [
        "checkpoint-5"
    ]  # no mark of a job that is never started again


def with_state(parent: Path, step: int, started: float) -> Path:
    folder = parent / f"checkpoint-{step}"
    checkpoints.write(folder, lambda partial: training_state.save(partial, {"started": started}))
    return folder


def at(time: float, folder: Path) -> Path:
    os.utime(folder, (time, time))
    return folder


def test_a_later_checkpoint_without_a_training_state_is_not_passed_over(tmp_path: Path):
    """Of `save_only_model`; once an earlier run in the folder was gone on with, without a word."""
    earlier = at(1, with_state(tmp_path, 10, started=1.0))
    at(2, with_state(tmp_path, 5, started=0.5))
    bare = at(3, make(tmp_path, 4))
    with pytest.raises(
        MetaPeftError, match=r"checkpoint-4 was written last and has no training state \(save_only"
    ) as no:
        checkpoints.to_resume(True, tmp_path)
    assert f"resume_from_checkpoint={earlier};" in str(no.value)
    assert checkpoints.to_resume(str(earlier), tmp_path) == earlier
    at(0, bare)
    assert checkpoints.to_resume(True, tmp_path) == earlier, "what was written before it says nothing"
    damaged_text(bare)
    at(3, bare)
    assert checkpoints.to_resume(True, tmp_path) == earlier, "what is damaged is passed over, as ever"
    newest = at(4, with_state(tmp_path, 1, started=2.0))
    assert checkpoints.to_resume(True, tmp_path) == newest


@pytest.mark.parametrize("asked", [None, "checkpoint-100", True])
def test_a_job_that_is_started_again_goes_on_from_its_own(tmp_path: Path, asked: str | bool | None):
    earlier = make(tmp_path, 100)
    os.utime(earlier, (0, 0))
    asked = str(earlier) if isinstance(asked, str) else asked
    at_first = earlier if asked else None

    def resume(attempt):
        return checkpoints.to_resume(asked, tmp_path, attempt=attempt)

    assert [resume(0), resume(1), resume(2)] == [at_first] * 3
    own = make(tmp_path, 10)
    assert resume(3) == own
    damaged_text(own)
    assert resume(4) == at_first
    os.utime(make(tmp_path, 20), (0, 0))  # and the next job there has none of its own
    os.utime(own, (0, 0))
    assert resume(0) == (tmp_path / "checkpoint-100" if asked else None)


def test_a_job_whose_first_attempt_never_came_to_train_marks_its_beginning_at_the_second(tmp_path: Path):
    assert checkpoints.to_resume(None, tmp_path, attempt=1) is None
    own = make(tmp_path, 10)
    assert checkpoints.to_resume(None, tmp_path, attempt=2) == own
