from __future__ import annotations

from pathlib import Path

import pytest
from kinds import HEAD, peft_model, processor, rows
from surface import config, tiny_folder
from transformers import AutoConfig

from meta_peft import MetaTrainer, ModelArguments, TaskSet
from meta_peft.adaptation.stacks import encoded_support
from meta_peft.adapters.hub import meta_learned
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
