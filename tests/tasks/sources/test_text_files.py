from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources import text_files
from meta_peft.tasks.sources.text_files import read_rows, rows_of_file

ROWS = [{"input": "007", "target": "2024-03-05"}, {"input": "NA", "target": "a, b"}]


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("x.json", json.dumps(ROWS, indent=1)),
        ("x.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("x.jsonl", "\ufeff" + "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("x.json", "\ufeff" + json.dumps(ROWS)),
        ("x.csv", '\ufeffinput,target\r\n007,2024-03-05\r\n\r\nNA,"a, b"\r\n'),
        ("x.TSV", "input\ttarget\n007\t2024-03-05\nNA\ta, b\n"),
    ],
)
def test_every_value_is_what_stands_there(tmp_path: Path, name: str, content: str):
    """Nothing is taken for a number, a date or a missing value."""
    assert list(rows_of_file(written(tmp_path, name, content))) == ROWS


def test_text_has_a_row_for_each_line(tmp_path: Path):
    assert list(rows_of_file(written(tmp_path, "x.txt", "\ufeff one \n\ntwo\u2028three\n"))) == [
        {"text": "one"},
        {"text": "two\u2028three"},
    ]


def test_parquet_with_classes(tmp_path: Path):
    """Class numbers are learned by their names; a missing class is nothing."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    dataset.to_parquet(tmp_path / "x.parquet")
    assert list(rows_of_file(tmp_path / "x.parquet")) == [
        {"text": "a", "label": "good"},
        {"text": "b", "label": "bad"},
        {"text": "c", "label": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", '{"a": 1}\n\n[1, 2]\n', r"x.jsonl, line 3: expected an object with columns, got \[1, 2\]"),
        ("x.jsonl", "\n \n", "x.jsonl has no rows"),
        ("x.jsonl", b'{"a": 1}\n\xff\xfe{}', r"x.jsonl, line 2: not UTF-8 text \(invalid start byte at byte 9\)"),
        ("x.json", '[{"a": 1},\n 2\n]', "x.json, item 2: expected an object"),
        ("x.json", '[{"a": 1},\n 2', "x.json, line 2: not JSON"),
        ("x.json", "[" * 10**5, "x.json: not JSON"),
        (
            "x.jsonl",
            '{"a": 1, "b": {"a": 1}}\n{"a": 1, "a": 2}',
            r"x.jsonl, line 2: not JSON \(the name 'a' is .* twice",
        ),
        ("x.json", '[{"a": 1, "a": 2}]', r"x.json: not JSON \(the name 'a' is in one object twice"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", "x.csv, line 3: expected 2 values, as in the first line, got 3"),
        ("x.csv", "a,a\n", "x.csv: the first line must name each column once"),
        ("x.csv", 'a,b\n1,"2"3\n', "x.csv, line 2: not CSV"),
        ("x.csv", 'a,b\n1,2\n3,"4\n' + "5,6\n" * 50_000, r"x.csv, line 3: not CSV \(unexpected end of data\)"),
        ("x.csv", b"a\n\xe9\n", "x.csv, line 2: not UTF-8 text"),
        ("x.parquet", "no", "x.parquet is damaged or not Parquet"),
        ("x.jsnl", "{}", r"x.jsnl is of no known kind: name it .jsonl, .*Did you mean '.jsonl'"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, name: str, content, message: str):
    with pytest.raises(MetaPeftError, match=message):
        list(rows_of_file(written(tmp_path, name, content)))


def test_characters_that_end_a_line_elsewhere_are_content(tmp_path: Path):
    """JSON lines end at newlines only; U+2028 and its like may stand inside a string."""
    line = json.dumps({"input": "x\u2028y\x85z", "target": "1"}, ensure_ascii=False) + "\r\n"
    assert read_rows(written(tmp_path, "x.jsonl", line))[0]["input"] == "x\u2028y\x85z"


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_long_text_may_stand_in_any_kind_of_file(tmp_path: Path, quote: str):
    text = "x" * 5_000_000
    row = [{"input": text, "target": "y"}]
    assert read_rows(written(tmp_path, "x.jsonl", json.dumps(row[0]))) == row
    assert read_rows(written(tmp_path, "x.csv", f"input,target\n{quote}{text}{quote},y\n")) == row


def test_an_open_quote_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = csv.field_size_limit(1000)
    try:
        monkeypatch.setattr(text_files, "LARGEST_CELL", 1000)
        with pytest.raises(MetaPeftError, match=r"x.csv, line 2: not CSV \(field larger than field limit"):
            read_rows(written(tmp_path, "x.csv", 'a\n"' + "b\n" * 1000))
    finally:
        csv.field_size_limit(before)


def test_sounds_are_beside_the_file_that_names_them(tmp_path: Path):
    """As in training, wherever the rows are read from."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(b"RIFF")
    lines = "".join(json.dumps({"audio": name, "text": "x"}) + "\n" for name in ("clips/a.wav", "elsewhere.wav"))
    whole = str((tmp_path / "clips" / "a.wav").resolve())
    assert [row["audio"] for row in read_rows(written(tmp_path, "x.jsonl", lines))] == [whole, "elsewhere.wav"]


def test_no_file(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"There is no file '.*absent.jsonl'"):
        read_rows(tmp_path / "absent.jsonl")


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"Expected a file of rows, and '.*' is a folder: name one of its files"):
        read_rows(tmp_path)
