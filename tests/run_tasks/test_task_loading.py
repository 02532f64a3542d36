"""Tasks as a config file names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from surface import config, letter_tasks, write_jsonl

from meta_peft import MetaPeftError, TaskArguments, TaskSet
from meta_peft.config.config_file import parse
from meta_peft.run_tasks.task_loading import load_tasks, with_enough_rows
from meta_peft.tasks.row_form import RowForm

LABELLED = [{"text": f"{c}{i}", "label": c} for c in "abcdefghij" for i in range(6)]


def jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments(tmp_path: Path, **options) -> TaskArguments:
    """What a YAML file with these options gives."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return parse([TaskArguments], ["--config", str(tmp_path / "config.yaml")])[0]


def loaded(tmp_path: Path, column: str | list[str] = "task", **options) -> dict[str, TaskSet]:
    return load_tasks(arguments(tmp_path, **options), column)


def names(tasks: dict[str, TaskSet]) -> dict[str, list[str]]:
    return {split: of_split.names for split, of_split in tasks.items()}


def test_a_file_for_each_split_and_a_folder_of_tasks(tmp_path: Path):
    train = write_jsonl(tmp_path / "train.jsonl", letter_tasks("ab"))
    for name, rows in letter_tasks("cd").items():
        jsonl(tmp_path / "test" / f"{name}.jsonl", rows)
    tasks = loaded(tmp_path, train_tasks=str(train), test_tasks=str(tmp_path / "test"))
    assert names(tasks) == {"train": ["say a", "say b"], "test": ["say c", "say d"]}


def test_several_files(tmp_path: Path):
    paths = [jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in letter_tasks("ab").items()]
    assert names(loaded(tmp_path, train_tasks=paths)) == {"train": ["say a", "say b"]}


def test_several_columns_name_a_task(tmp_path: Path):
    rows = [{"who": who, "lang": lang, "input": "1", "target": "x"} for who in "ab" for lang in "xy"]
    tasks = loaded(tmp_path, ["who", "lang"], train_tasks=jsonl(tmp_path / "t.jsonl", rows))
    assert tasks["train"].names == ["a / x", "a / y", "b / x", "b / y"]


def test_a_dataset_with_all_splits(tmp_path: Path):
    tables = {
        split: Dataset.from_list([{"task": t, **row} for t, rows in letter_tasks(letters).items() for row in rows])
        for split, letters in {"train": "ab", "dev": "c", "test": "d"}.items()
    }
    DatasetDict(tables).save_to_disk(tmp_path / "saved")
    found = {"train": ["say a", "say b"], "validation": ["say c"], "test": ["say d"]}
    assert names(loaded(tmp_path, dataset_name=str(tmp_path / "saved"), dataset_validation_split="dev")) == found
    del found["validation"]
    assert names(loaded(tmp_path, dataset_name=str(tmp_path / "saved"))) == found


def test_class_disjoint_splits_of_labelled_data(tmp_path: Path):
    path = jsonl(tmp_path / "all.jsonl", LABELLED)
    tasks = loaded(tmp_path, "label", train_tasks=path, split_fractions=[0.6, 0.2, 0.2], split_seed=1)
    assert {split: len(of_split) for split, of_split in tasks.items()} == {"train": 6, "validation": 2, "test": 2}
    assert sorted(name for of_split in tasks.values() for name in of_split.names) == list("abcdefghij")
    again = loaded(tmp_path, "label", dataset_name=path, split_fractions=[0.6, 0.2, 0.2], split_seed=1)
    assert names(again) == names(tasks)


def test_renamed_columns(tmp_path: Path):
    path = jsonl(tmp_path / "x.jsonl", [{"task": "a", "sentence": "s", "mood": "m", "text": "other"}])
    tasks = loaded(tmp_path, train_tasks=path, rename_columns=["sentence=text", "mood=label"])
    assert tasks["train"].rows("a") == [{"task": "a", "text": "s", "label": "m"}]
    assert tasks["train"].row_form == RowForm({"sentence": "text", "mood": "label"}), "for the adapter's sidecar"
    with pytest.raises(MetaPeftError, match=r"no column 'sentense'; the columns are .* Did you mean 'sentence'\?"):
        loaded(tmp_path, train_tasks=path, rename_columns=["sentense=text"])


def test_translation(tmp_path: Path):
    rows = [{"translation": {"en": f"one {i}", "de": f"eins {i}"}} for i in range(3)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    assert loaded(tmp_path, train_tasks=path)["train"].names == ["en-de", "de-en"]
    german = loaded(tmp_path, train_tasks=path, source_lang="de")["train"]
    assert german.names == ["de-en"]
    assert german.row_form == RowForm(translation=True, source_lang="de")
    with pytest.raises(MetaPeftError, match="source_lang and target_lang are of rows with a column 'translation'"):
        loaded(tmp_path, train_tasks=jsonl(tmp_path / "y.jsonl", LABELLED), source_lang="de")


def test_plain_text(tmp_path: Path):
    words = [f"word{'abcdefgh'[i]}" for i in range(8)]
    text = "\n".join(f"In {i} {'abcdefgh'[i % 7]} we find {words[i % 8]} here again now." for i in range(160))
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    options = {"train_tasks": str(tmp_path / "corpus.txt"), "split_fractions": [0.5, 0.25, 0.25]}
    with pytest.raises(MetaPeftError, match="0 words are in"):  # each word is in an eighth of the sentences
        loaded(tmp_path, **options, self_supervised="smlmt")
    spans = loaded(tmp_path, train_tasks=options["train_tasks"], self_supervised="span", mask_word="[X]")["train"]
    assert len(spans) == 160
    assert "[X]" in spans.rows(spans.names[0])[0]["prompt"]
    (tmp_path / "other.txt").write_text(text.replace("find", "lose"), encoding="utf-8")
    files = {"train_tasks": options["train_tasks"], "test_tasks": str(tmp_path / "other.txt")}
    ends = loaded(tmp_path, **files, self_supervised="continuation")
    assert [len(of_split) for of_split in ends.values()] == [160, 160]
    with pytest.raises(MetaPeftError, match="160 tasks are in both the train and the test tasks, 'In 0 a we find"):
        loaded(tmp_path, **{**files, "test_tasks": options["train_tasks"]}, self_supervised="continuation")


def test_smlmt_needs_no_task_column(tmp_path: Path):
    lines = [f"Sentence {i} speaks of word{'abcdefghijklmnopqrstuvwxyzäö'[i % 28]} here." for i in range(280)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    options = {"train_tasks": str(tmp_path / "corpus.txt"), "split_fractions": [0.5, 0.25, 0.25]}
    tasks = loaded(tmp_path, **options, self_supervised="smlmt")
    assert [len(of_split) for of_split in tasks.values()] == [14, 7, 7]
    assert tasks["train"].task_columns == ("label",), "for the adapter's sidecar"
    assert tasks["train"].rows(tasks["train"].names[0])[0]["text"].endswith("speaks of ___ here.")


def test_small_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = {**letter_tasks("ab"), **letter_tasks("c", n=3)}
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    args = config(tmp_path, shots=2, query_size=2)
    given = arguments(tmp_path, train_tasks=path)
    with pytest.raises(MetaPeftError, match=r"Task 'say c' has 3 distinct rows.*small_tasks: leave_out"):
        with_enough_rows(load_tasks(given), given, args)
    given = arguments(tmp_path, train_tasks=path, small_tasks="leave_out")
    with caplog.at_level("INFO", "meta_peft"):
        tasks = with_enough_rows(load_tasks(given), given, args)
    assert tasks["train"].names == ["say a", "say b"]
    assert tasks["train"].found["small_tasks"] == 1
    assert caplog.messages == ["train: 1 tasks left out, which have too few rows or classes."]


def test_what_was_found_before_a_split_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Of which part a row that was left out would have been is not known."""
    tasks = letter_tasks("abcdefgh")
    tasks["say a"] = [*tasks["say a"], tasks["say a"][0]]
    tasks["say b"] = tasks["say b"][:2]
    path = str(write_jsonl(tmp_path / "x.jsonl", tasks))
    given = arguments(tmp_path, train_tasks=path, split_fractions=[0.5, 0.25, 0.25], small_tasks="leave_out")
    with caplog.at_level("INFO", "meta_peft"):
        parts = with_enough_rows(load_tasks(given), given, config(tmp_path, shots=2, query_size=2))
    (of,) = (split for split, part in parts.items() if "small_tasks" in part.found)
    assert caplog.messages == [
        "all tasks: 1 repeated rows left out.",
        f"{of}: 1 tasks left out, which have too few rows or classes.",
    ]


def test_small_classes(tmp_path: Path):
    """Held-out classes need one query row only."""
    path = jsonl(tmp_path / "x.jsonl", LABELLED[:-4])
    args = config(tmp_path, shots=2, query_size=2, task_column=["label"], ways=2)
    given = arguments(tmp_path, train_tasks=path)
    with pytest.raises(MetaPeftError, match="Class 'j' has 2 distinct rows"):
        with_enough_rows(load_tasks(given, "label"), given, args)
    given = arguments(tmp_path, train_tasks=path, small_tasks="leave_out")
    assert with_enough_rows(load_tasks(given, "label"), given, args)["train"].names == list("abcdefghi")


def test_empty_rows(tmp_path: Path):
    rows = [{"task": "a", "input": "x", "target": "y"}, {"task": "a", "input": None, "target": "y"}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(MetaPeftError, match="Row 2 has nothing in the column 'input'"):
        loaded(tmp_path, train_tasks=path)
    tasks = loaded(tmp_path, train_tasks=path, empty_rows="leave_out")
    assert tasks["train"].found["empty_rows"] == 1


def test_a_class_in_two_splits(tmp_path: Path):
    files = [jsonl(tmp_path / f"{i}.jsonl", LABELLED[: 12 + i]) for i in range(2)]
    with pytest.raises(MetaPeftError, match=r"2 tasks are in both the train and the test tasks.*\(split_fractions\)"):
        loaded(tmp_path, "label", train_tasks=files[0], test_tasks=files[0])


@pytest.mark.parametrize("options", [{"split_fractions": [0.8, 0.1, 0.1]}, {"self_supervised": "smlmt"}])
def test_options_of_tasks_that_are_not_named(tmp_path: Path, options: dict):
    """They must not end in a run on the demo."""
    with pytest.raises(MetaPeftError, match=f"{next(iter(options))} is of tasks of your own, and the demo"):
        loaded(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty_rows": "skip"}, "empty_rows must be one of error, leave_out; got 'skip'"),
        ({"small_tasks": "leave_ou"}, "got 'leave_ou'. Did you mean 'leave_out'"),
        ({"self_supervised": "spam"}, "must be one of smlmt, span, continuation; got 'spam'. Did you mean 'span'"),
        ({"self_supervised": "span", "source_lang": "de"}, "self_supervised and languages are both set"),
        ({"mask_word": ""}, "mask_word is empty"),
        ({"dataset_name": "x", "train_tasks": ["y"]}, "dataset_name holds all splits: leave train_tasks"),
        ({"streaming": True}, "are of the dataset that dataset_name names"),
        ({"dataset_name": "x", "max_rows": 3}, "max_rows limits a stream"),
        ({"dataset_name": "x", "streaming": True, "max_rows": 0}, "max_rows must be a number of 1 or more"),
        ({"split_fractions": [0.5, 0.5]}, "split_fractions must be three positive numbers that add up to 1"),
        ({"split_fractions": [0.5, 0.5, 0.1]}, "split_fractions must be three positive numbers that add up to 1"),
        ({"split_fractions": [0.8, 0.1, 0.1], "test_tasks": ["x"]}, "split_fractions make validation and test tasks"),
        ({"rename_columns": ["a"]}, "rename_columns must be pairs such as sentence=text"),
        ({"rename_columns": ["a=b", "c=b"]}, "rename_columns must be pairs"),
        ({"task_colum": "x"}, "unknown key 'task_colum'"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_words": "letters"}, "label_words: letters is of episodes of classes: say of how many"),
        (
            {"label_words": "latters"},
            "label_words must be one of given, permuted, letters; got 'latters'. Did you mean",
        ),
        ({"ways": 1}, "ways must be a whole number of 2 or more; got 1"),
        ({"assistant_turns": "first"}, "assistant_turns must be one of last, all; got 'first'"),
        ({"context_template": "{context}"}, "context_template must contain"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be a number of 1 or more"),
    ],
)
def test_training_options_that_cannot_be(tmp_path: Path, options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        config(tmp_path, **options)
