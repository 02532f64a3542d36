"""A file for each task, beside what else lies in folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources import opened

ROW = {"input": "1", "target": "x"}


def jsonl(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_hidden_copies_are_no_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Of notebooks' checkpoints, and what macOS writes beside a file."""
    folder = tmp_path / ".hidden" / "tasks"  # what was asked for may be hidden itself
    jsonl(folder / "a.jsonl", ROW)
    jsonl(folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl", ROW)
    (folder / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07\xff")
    with caplog.at_level(logging.INFO, logger="meta_peft"):
        assert opened(folder)["task"] == ["a"]
    assert caplog.text == ""


def test_files_of_other_kinds_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    jsonl(tmp_path / "a.jsonl", ROW)
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="meta_peft"):
        opened(tmp_path)
        for name in "cdef":
            (tmp_path / f"{name}.md").write_text("")
        opened(tmp_path)
    kinds = ".jsonl, .json, .csv, .tsv, .txt, .parquet"
    assert caplog.messages == [
        f"{tmp_path}: 1 file is not read, of another kind than {kinds}: b.jsonl.gz",
        f"{tmp_path}: 5 files are not read, of another kind than {kinds}: b.jsonl.gz, c.md, d.md, ...",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "README.txt",
            "about",
            r"a.csv has the columns \['input', 'target'\], and no file before it, such as .*README.txt",
        ),
        (
            "meta.json",
            '{"version": 1}',
            r"meta.json has the columns \['version'\], and no file before it, such as .*a.csv",
        ),
    ],
)
def test_a_file_that_holds_no_tasks_is_named(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / "a.csv").write_text("input,target\n1,x\n")
    (tmp_path / "b.csv").write_text("input,target,note\n1,x,y\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(MetaPeftError, match=message):
        opened(tmp_path)


def test_files_of_one_name_need_a_task_column_only(tmp_path: Path):
    own = [jsonl(tmp_path / year / "data.jsonl", {"task": year, **ROW}) for year in ("2023", "2024")]
    assert opened(own)["task"] == ["2023", "2024"]
    twins = [*own, jsonl(tmp_path / "data.jsonl", {"task": "own", **ROW}, ROW)]
    with pytest.raises(MetaPeftError, match=r"Two files would be the task 'data', .* rename one, or .* \('task'\)"):
        opened(twins)


def test_files_of_one_name_in_a_folder(tmp_path: Path):
    """Of two kinds: neither is lost."""
    jsonl(tmp_path / "a.jsonl", {"task": "x", **ROW})
    (tmp_path / "a.csv").write_text("task,input,target\ny,1,x\n")
    assert opened(tmp_path)["task"] == ["y", "x"]
    (tmp_path / "a.csv").write_text("input,target\n1,x\n")
    with pytest.raises(MetaPeftError, match=r"Two files would be the task 'a', .*a.csv for one"):
        opened(tmp_path)
