from __future__ import annotations

import json
from pathlib import Path

import pytest
from family import run, sample, split, write

from meta_peft import MetaPeftError, TaskSet

TASKS = {f"{group}_{i}": [{"input": f"{group}{i}", "target": "ü"}] for group in "abcdefghij" for i in range(3)}


def test_groups_stay_together_and_nothing_is_lost():
    splits = split(TASKS, 0, group=lambda name: name[0])
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(name for tasks in splits.values() for name in tasks) == sorted(TASKS)
    groups = [{name[0] for name in tasks} for tasks in splits.values()]
    assert [len(found) for found in groups] == [6, 2, 2]
    assert all(len(tasks) == 3 * len(found) for tasks, found in zip(splits.values(), groups, strict=True))


def test_the_seed_decides_the_split():
    splits = [split(TASKS, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_samples_are_rows_without_repetition():
    rows = [{"input": str(i)} for i in range(10)]
    drawn = sample(rows, 4, 0)
    assert len({row["input"] for row in drawn}) == 4
    assert drawn == sample(rows, 4, 0) != sample(rows, 4, 1)
    assert sorted(sample(rows, 99, 0), key=str) == rows


def test_what_is_written_can_be_read(tmp_path: Path):
    splits = split(TASKS, 0)
    write(tmp_path, splits, "\n# Source\n")
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl", "SOURCE.md"}
    for part, tasks in splits.items():
        read = TaskSet.from_jsonl(tmp_path / f"{part}.jsonl")
        assert {
            name: [{k: v for k, v in row.items() if k != "task"} for row in read.rows(name)] for name in read.names
        } == tasks
    assert "ü" in (tmp_path / "test.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "SOURCE.md").read_text() == "# Source\n"


def test_a_program_prints_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    asked = []

    def make(options, scratch):
        asked.append(options.seed)
        return split(TASKS, 0)

    code = run("letters", "About.", "# Source", make, words=[])
    assert (code, asked) == (0, [0])
    lines = (tmp_path / "data" / "letters" / "train.jsonl").read_text().splitlines()
    assert f"train: {len(lines)} tasks, {len(lines)} rows\n" in capsys.readouterr().out
    assert {"task", "input", "target"} == json.loads(lines[0]).keys()


def test_what_cannot_be_had_is_said_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def make(options, scratch):
        raise MetaPeftError("The package is not there.")

    assert run("letters", "About.", "# Source", make, words=[str(tmp_path / "made")]) == 2
    assert "The package is not there." in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
