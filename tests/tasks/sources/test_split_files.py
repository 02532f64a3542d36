from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources import opened_splits
from meta_peft.tasks.sources.split_files import split_files


def written(path: Path, task: str | None) -> None:
    """Two rows, of `task` if they name one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"input": f"{path.stem} {i}", "target": "x", **({"task": task} if task else {})} for i in range(2)]
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "names",
    [
        [
            "data/train-00000-of-00001.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ],
        [
            "train-00000-of-00001-a09b74b3ef9c3b56.parquet",
            "validation-00000-of-00001.parquet",
            "test-00000-of-00001.parquet",
        ],
        ["data/train.jsonl", "data/validation.jsonl", "data/test.jsonl"],
        ["train.jsonl", "validation.csv", "Test.JSONL"],
        ["train_1.jsonl", "validation-0.jsonl", "test00.jsonl"],
        ["data/train/0000.parquet", "data/validation/0000.parquet", "data/test/0000.parquet"],
    ],
)
def test_a_clone_of_a_dataset_has_its_splits(tmp_path: Path, names: list[str]):
    """As they lie on the hub: what is trained on has no row of another split."""
    for task, name in zip("abc", names, strict=True):
        written(tmp_path / name, task)
    splits = opened_splits(str(tmp_path))
    assert {split: set(rows["task"]) for split, rows in splits.items()} == {
        "train": {"a"},
        "validation": {"b"},
        "test": {"c"},
    }


def test_a_split_has_all_files_of_its_name(tmp_path: Path):
    """And none of them is a task."""
    for name in ("train.jsonl", "train.csv", "train-2.jsonl", "train_3.jsonl"):
        written(tmp_path / name, "a")
    rows = opened_splits(str(tmp_path))["train"]
    assert len(rows) == 8
    assert set(rows["task"]) == {"a"}
    for shard in range(2):
        written(tmp_path / "shards" / f"train-0000{shard}-of-00002.jsonl", None)
    assert opened_splits(str(tmp_path / "shards"))["train"].column_names == ["input", "target"]


def test_splits_keep_their_names(tmp_path: Path):
    for name in ("train_sft-00000-of-00001", "test_sft-00000-of-00001", "extra-00000-of-00001", "dev"):
        written(tmp_path / "data" / f"{name}.jsonl", name)
    assert sorted(split_files(tmp_path)) == ["dev", "extra", "test_sft", "train_sft"]
    splits = opened_splits(str(tmp_path), splits={"train": "train_sft", "validation": "dev"})
    assert {split: set(rows["task"]) for split, rows in splits.items()} == {
        "train": {"train_sft-00000-of-00001"},
        "validation": {"dev"},
    }


@pytest.mark.parametrize("names", [["german.jsonl", "french.jsonl"], ["part-00000-of-00002.jsonl"], ["de_train.jsonl"]])
def test_a_folder_without_splits_has_none(tmp_path: Path, names: list[str]):
    for name in names:
        written(tmp_path / name, "a")
    assert split_files(tmp_path) == {}
    assert len(opened_splits(str(tmp_path))["train"]) == 2 * len(names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["en/train-00000-of-00001.jsonl", "en/test-00000-of-00001.jsonl"], "such as en/test-00000-of-00001.jsonl"),
        (["reviews_train.jsonl", "reviews_test.jsonl"], "such as reviews_test.jsonl"),
        (["test_matched.jsonl", "train_all.jsonl"], "such as test_matched.jsonl"),
    ],
)
def test_what_may_be_splits_is_not_trained_on(tmp_path: Path, names: list[str], said: str):
    for name in names:
        written(tmp_path / name, "a")
    with pytest.raises(
        MetaPeftError, match=rf"seems to hold splits \({said}\), and .* call the files or folders train,"
    ):
        opened_splits(str(tmp_path))


def test_splits_that_a_card_names(tmp_path: Path):
    """Of files whose names say nothing."""
    for name in "ab":
        written(tmp_path / f"{name}.csv", name)
    split = '  - split: {0}\n    path: "{1}.csv"\n'
    card = f"---\nconfigs:\n- data_files:\n{split.format('train', 'a')}{split.format('test', 'b')}---\n# A dataset\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    with pytest.raises(MetaPeftError, match=r"seems to hold splits \(test and train by its README.md\)"):
        opened_splits(str(tmp_path))
    (tmp_path / "README.md").write_text("# A dataset\nsplit: train\nsplit: test\n", encoding="utf-8")
    assert len(opened_splits(str(tmp_path))["train"]) == 4


def test_splits_in_two_places(tmp_path: Path):
    written(tmp_path / "test.jsonl", "a")
    written(tmp_path / "data" / "train.jsonl", "b")
    with pytest.raises(MetaPeftError, match=r"There are splits both in .* and in its folder data: give the latter"):
        opened_splits(str(tmp_path))


def test_what_is_of_no_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("train.jsonl", "more/other.jsonl", ".cache/test.jsonl"):
        written(tmp_path / name, "a")
    (tmp_path / "test.jsonl.gz").write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="meta_peft"):
        assert list(opened_splits(str(tmp_path))) == ["train"]
    assert len(caplog.messages) == 1
    assert "2 files are not read, called after no split or of another kind than" in caplog.text
    assert caplog.messages[0].endswith(": more/other.jsonl, test.jsonl.gz")
