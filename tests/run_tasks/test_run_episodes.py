from __future__ import annotations

from pathlib import Path

import pytest
from kinds import HEAD, arguments, peft_model, processor, rows
from surface import config, tiny_folder
from transformers import AutoConfig

from meta_peft import MetaPeftError, MetaTrainer, ModelArguments, TaskSet, load
from meta_peft.adaptation.stacks import encoded_support
from meta_peft.adapters.hub import meta_learned
from meta_peft.base import load_base
from meta_peft.run_tasks.run_episodes import labels_of, most_classes, with_classes

NAMES = {f"{n}": [{"text": f"{c}{i}", "label": c} for c in "abcd"[:n] for i in range(2)] for n in (2, 4, 3)}
NUMBERS = {"a": [{"text": f"x{n}", "label": n} for n in (0, 2)], "b": [{"text": f"y{n}", "label": n} for n in (0, 1)]}
WORDS = {"a": [{"tokens": ["x", "y"], "tags": [["o", "p"], ["o", "q"]][n]} for n in (0, 1)]}


@pytest.mark.parametrize(
    ("splits", "ways", "expected"),
    [
        ([NAMES], None, 4),
        ([NAMES], 5, 5),
        ([NUMBERS], None, 3),
        ([WORDS], None, 3),
        ([NUMBERS, NAMES], 2, 4),
        ([], None, 2),
        ([{"a": NAMES["2"][:2]}], None, 2),  # one class, and a head has two at least
    ],
)
def test_most_classes(splits: list[dict], ways: int | None, expected: int):
    assert most_classes([TaskSet.of(tasks) for tasks in splits], ways) == expected


IDS = {t: [{"text": f"{t}{n}", "label": 10_001 + n} for n in range(k)] for t, k in (("a", 3), ("b", 2))}


def test_ids_under_other_words_are_names():
    """Episodes give their classes numbers from 0, so that a head needs no class 10003."""
    within, classes = [TaskSet.of(IDS)], [TaskSet.of([{**row, "task": t} for t in IDS for row in IDS[t]], "label")]
    for words in ("permuted", "letters"):
        assert most_classes(within, 2, words) == 3, "the most that a task has, as with names"
        assert most_classes(classes, 2, words) == 2
    for tasks in (within, classes):
        with pytest.raises(MetaPeftError, match="3 of them, of which the largest is 10003"):
            most_classes(tasks, 2)
        with pytest.raises(MetaPeftError, match="the largest is 10003"):
            with_classes(ModelArguments(str(tiny_folder()), objective=HEAD), tasks, 2)
    assert with_classes(ModelArguments(str(tiny_folder()), objective=HEAD), within, 2, "letters").num_labels == 3


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, "numbers"),
        ({"ways": 2}, "numbers"),
        ({"ways": 2, "label_words": "letters"}, "ids"),
        ({"ways": 2, "label_words": "permuted"}, "ids"),
        ({"learn_head": False}, "ids"),
    ],
)
def test_what_labels_are_to_an_adapter(tmp_path: Path, options: dict, labels: str):
    """Saved with it: then the same rows are the same classes in a file whose values are text."""
    tasks = {t: [{"text": f"{t}{n}", "label": n % 2 + 1} for n in range(8)] for t in "abc"}
    how = {"shots": 1, "query_size": 1, "max_steps": 1, **options}
    run = MetaTrainer(peft_model(HEAD), config(tmp_path, **how), tasks, processing_class=processor(HEAD))
    run.save_model()
    learned = meta_learned(load(load_base(arguments(HEAD)), tmp_path, tokenizer=processor(HEAD)))
    assert learned.encoding.facts.labels == labels
    text = [{**row, "label": str(row["label"])} for row in tasks["a"]]
    numbers, words = (
        [row["labels"] for row in encoded_support(learned, "new", rows).rows] for rows in (tasks["a"], text)
    )
    assert numbers == [[row["label"]] for row in tasks["a"]]
    assert words == (numbers if labels == "numbers" else [[row["label"] - 1] for row in tasks["a"]])
    named = [{**row, "label": "xy"[row["label"] - 1]} for row in tasks["a"]]
    if labels == "ids":
        assert [row["labels"] for row in encoded_support(learned, "new", named).rows] == words, "names of the new task"
    else:
        with pytest.raises(MetaPeftError, match="Label 'x' is no number, and labels were numbers in training"):
            encoded_support(learned, "new", named)


def test_where_neither_options_nor_base_say_how_many(tmp_path: Path):
    tasks = [TaskSet.of(NAMES)]

    def classes(folder: Path, **options) -> int | None:
        return with_classes(ModelArguments(str(folder), **options), tasks, None).num_labels

    assert classes(tiny_folder()) is None, "it writes"
    assert classes(tiny_folder(), objective="sequence_classification") == 4
    assert classes(tiny_folder(), objective="sequence_classification", num_labels=7) == 7
    config = AutoConfig.from_pretrained(tiny_folder(), num_labels=6)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path)
    assert classes(tmp_path) is None, "the base has a head of its own"


def test_labels_of_rows_that_were_left_out_are_none():
    """Numbers of classes that only they have need no place in a head."""
    given = {"a": [*NUMBERS["a"], {"text": None, "label": 9}, {"text": "z", "label": None}], "b": NUMBERS["b"]}
    tasks = TaskSet.of([{"task": t, **row} for t in given for row in given[t]], empty_rows="leave_out")
    assert list(labels_of(tasks)) == [0, 2, 0, 1]
    assert most_classes([tasks], None) == 3


def test_classes_have_the_numbers_that_adapting_gives_them(tmp_path: Path):
    """In training and in evaluation, where an episode has two of the three classes that all tasks share."""
    words = {"b": "maybe", "c": "no", "d": "yes"}
    tasks = {t: [{"text": f"{c}{t}{n}", "label": words[c]} for c in words for n in "xyz"] for t in "abcdef"}
    how = {"ways": 2, "shots": 1, "query_size": 1, "max_steps": 6, "prompt_template": "{input}"}
    train, held_out = ({t: tasks[t] for t in names} for names in ("abcd", "ef"))
    read = processor(HEAD)
    run = MetaTrainer(peft_model(HEAD), config(tmp_path, **how), train, held_out, processing_class=read)
    run.train()
    episodes = [drawn[i] for drawn in (run.train_dataset, run.eval_dataset) for i in range(len(drawn))]
    seen = {
        (read.decode(row["input_ids"], skip_special_tokens=True)[0], row["labels"][0])
        for episode in episodes
        for row in (*episode.support, *episode.query)
    }
    for names in ("bcd", "bd"):  # of all classes, and of some
        support = [{"text": c, "label": words[c]} for c in names]
        adapted = encoded_support(meta_learned(run.loss_fn.model), "new", support).rows
        assert {(c, row["labels"][0]) for c, row in zip(names, adapted, strict=True)} <= seen
    assert len(seen) == 3


@pytest.mark.parametrize("empty", [None, ""])
def test_training_and_evaluation_without_rows_that_have_no_class(tmp_path: Path, empty: str | None):
    def tasks(letters: str) -> TaskSet:
        of_all = [{"task": c, **row} for c in letters for row in (*rows(HEAD, c), {"text": "x", "label": empty})]
        return TaskSet.of(of_all, empty_rows="leave_out")

    run = MetaTrainer(peft_model(HEAD), config(tmp_path), tasks("abc"), tasks("de"), processing_class=processor(HEAD))
    assert run.encoding.facts.label_names == ("no", "yes")
    run.train()
    assert run.evaluate()["eval_loss"] > 0
