from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import TaskSet
from meta_peft.tasks.sources import opened, opened_splits
from meta_peft.tasks.sources.opening import streamed

ROWS = [{"input": str(i), "target": "x"} for i in range(3)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_folder_has_a_file_for_each_task(tmp_path: Path):
    jsonl(tmp_path / "tasks" / "de" / "dates.jsonl", ROWS)
    (tmp_path / "tasks" / "en.csv").write_text("input,target\n0,x\n")
    (tmp_path / "tasks" / "notes.md").write_text("not read")
    expected = [{"task": "de/dates", **row} for row in ROWS] + [{"task": "en", **ROWS[0]}]
    assert list(opened(tmp_path / "tasks")) == expected


def test_several_files_are_a_task_each(tmp_path: Path):
    paths = [jsonl(tmp_path / f"{name}.jsonl", ROWS[:1]) for name in "ba"]
    assert opened(paths, "family")["family"] == ["b", "a"]
    with pytest.raises(MetaPeftError, match="Two files would be the task 'a'"):
        opened([paths[1], jsonl(tmp_path / "other" / "a.jsonl", ROWS)])


def test_rows_that_name_their_task_keep_it(tmp_path: Path):
    jsonl(tmp_path / "shards" / "1.jsonl", [{"task": "own", **row} for row in ROWS])
    assert set(opened(tmp_path / "shards")["task"]) == {"own"}


def test_one_file_names_its_tasks_itself(tmp_path: Path):
    assert opened(jsonl(tmp_path / "x.jsonl", ROWS)).column_names == ["input", "target"]


def test_saved_datasets(tmp_path: Path):
    table = Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert list(opened(tmp_path / "one")) == ROWS
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "all")
    with pytest.raises(MetaPeftError, match="holds the splits train, test: give it as dataset_name"):
        opened(tmp_path / "all")
    splits = opened_splits(str(tmp_path / "all"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "test": 1}
    with pytest.raises(MetaPeftError, match="is a saved dataset, which is given alone"):
        opened([tmp_path / "one", tmp_path / "one"])
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(MetaPeftError, match="damaged or not a saved dataset"):
        opened(tmp_path / "one")


def test_a_dataset_for_each_task():
    tables = {"a": Dataset.from_list(ROWS), "b": Dataset.from_list(ROWS[:1])}
    for source in (tables, DatasetDict(tables)):
        assert opened(source)["task"] == ["a", "a", "a", "b"]
    with pytest.raises(MetaPeftError, match=r"holds splits \(train\), and a set of tasks is one of them"):
        opened(DatasetDict(train=tables["a"]))
    with pytest.raises(MetaPeftError, match="the datasets of the tasks differ"):
        opened({"a": tables["a"], "b": Dataset.from_list([{"input": 1}])})


def test_streams_are_written_to_disk(tmp_path: Path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_dict({"text": list("abc"), "label": [1, 0, 1]}, features=features)
    stream = table.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    assert opened(stream)["label"] == ["good", "bad", "good"]
    assert len(streamed(stream, max_rows=2)) == 2
    assert opened(stream).cache_files

    def rows():
        yield from ROWS

    assert list(opened(rows())) == ROWS
    assert opened(rows()).cache_files


def test_splits_by_the_names_of_files_or_folders(tmp_path: Path):
    jsonl(tmp_path / "d" / "train" / "a.jsonl", ROWS)
    jsonl(tmp_path / "d" / "dev.jsonl", [{"task": "b", **row} for row in ROWS])
    splits = opened_splits(str(tmp_path / "d"), splits={"validation": "dev"})
    assert list(splits) == ["train", "validation"]
    assert set(splits["train"]["task"]) == {"a"}
    with pytest.raises(MetaPeftError, match=r"has no split 'dve'; .* Did you mean 'dev'\? .*dataset_validation_split"):
        opened_splits(str(tmp_path / "d"), splits={"validation": "dve"})


def test_a_file_or_folder_without_splits_is_for_training(tmp_path: Path):
    for source in (jsonl(tmp_path / "x" / "a.jsonl", ROWS), tmp_path / "x"):
        assert list(opened_splits(str(source))) == ["train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    """The hub's files lie here; all else is what `datasets` does with them."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_dict({"text": list("abc"), "label": [1, 0, 1]}, features=features)
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    for file in files.values():
        table.to_parquet(file)
    asked = []

    def load(name, config, streaming):
        asked.append((name, config))
        return load_dataset("parquet", data_files=files, streaming=streaming)

    monkeypatch.setattr("meta_peft.tasks.sources.opening.load_dataset", load)
    limits = {"streaming": True, "max_rows": 2} if streaming else {}
    splits = opened_splits("some-user/some-dataset", "english", **limits)
    assert asked == [("some-user/some-dataset", "english")]
    assert {split: len(rows) for split, rows in splits.items()} == dict.fromkeys(files, 2 if streaming else 3)
    assert TaskSet(splits["train"], "label").names == ["good", "bad"]


def test_what_is_here_is_not_streamed(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"streaming is for datasets of the hub, and .* is here"):
        opened_splits(str(tmp_path), streaming=True)


def test_what_is_not_there(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"There is no file 'absent.jsonl'"):
        opened("absent.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetaPeftError, match=r"has no file that ends with .jsonl"):
        opened(tmp_path / "empty")
    with pytest.raises(MetaPeftError, match=r"'no-one/nothing' cannot be loaded .*dataset_name is a hub id"):
        opened_splits("no-one/nothing")
    with pytest.raises(MetaPeftError, match=r"There is no file 'nothing.jsonl'"):
        opened_splits("nothing.jsonl")
    with pytest.raises(MetaPeftError, match="Expected tasks, got 3"):
        opened(3)
    with pytest.raises(MetaPeftError, match="row 1 is 3"):
        opened([3])


def test_sounds_are_beside_the_file_that_names_them(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(b"RIFF")
    rows = [{"audio": "clips/a.wav", "text": "x"}, {"audio": "elsewhere.wav", "text": "y"}]
    found = opened(jsonl(tmp_path / "x.jsonl", rows))["audio"]
    assert list(found) == [str((tmp_path / "clips" / "a.wav").resolve()), "elsewhere.wav"]


def test_a_mapping_of_datasets_that_hold_tasks_of_their_own_is_refused():
    """As a trainer's sets to evaluate on: each would become one task, of rows that contradict each other."""
    table = Dataset.from_list([{"task": t, "input": f"{t}{n}", "target": t} for t in "ab" for n in range(2)])
    with pytest.raises(MetaPeftError, match="'seen' holds several tasks of its own"):
        opened({"seen": table})
    assert len(opened({"a": table.filter(lambda row: row["task"] == "a")})) == 2
