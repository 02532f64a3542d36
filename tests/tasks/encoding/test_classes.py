"""Labels that are numbers, in files that keep numbers and in files where all is text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kinds import tokenizer

from meta_peft import MetaPeftError, PromptFormat, TaskSet
from meta_peft.tasks.encoding import Encoding, Facts
from meta_peft.tasks.encoding.classes import class_count, whole_number

STARS = [1, 2, 3, 4, 5]


def head(num_labels: int = 6, objective: str = "sequence_classification", **facts: Any) -> Encoding:
    return Encoding(objective, PromptFormat(), tokenizer(), 32, Facts(num_labels=num_labels, **facts))


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"a{i}", "label": label} for i, label in enumerate(labels)]


def classes(how: Encoding, *labels: Any) -> list[int]:
    """The numbers that the labels of one task get."""
    of_task = how.of_task(rows(*labels))
    return [of_task(row)["labels"][0] for row in rows(*labels)]


@pytest.mark.parametrize(
    ("label", "number"),
    [
        *[(3, 3), (3.0, 3), ("3", 3), (" 3", 3), ("3.0", 3), ("-1", -1), (True, 1)],
        *[(0.5, None), ("0.5", None), ("3a", None), ("", None), ("³", None), ("9" * 5000, None)],
        *[(float("nan"), None), (float("inf"), None), (None, None), ([3], None)],
    ],
)
def test_whole_numbers(label: Any, number: int | None):
    assert whole_number(label) == number


# ---- the head has learned numbers


def test_a_number_is_the_same_class_as_text():
    """As a CSV file has it; of a head that learned numbers."""
    how = head().naming(STARS)
    for labels in (STARS, [str(n) for n in STARS], [float(n) for n in STARS], [f"{n}.0" for n in STARS]):
        assert classes(how, *labels) == STARS
    assert classes(how, "4", "2") == [4, 2], "whichever of them a task has"
    tasks = TaskSet.from_mapping({"one": rows("5", "1"), "other": rows("2", "3")}).encoded(how)
    assert [[row["labels"] for row in tasks.rows(name)] for name in tasks.names] == [[[5], [1]], [[2], [3]]]


def test_words_of_a_row_too():
    how = head(3, "token_classification").naming([[0, 1], [2]])
    row = {"tokens": ["a", "b"], "tags": ["2", "1"]}
    assert [label for label in how.of_task([row])(row)["labels"] if label != -100] == [2, 1]


@pytest.mark.parametrize("label", ["good", "0.5", "1e0", "True"])
def test_other_names_are_refused_where_labels_were_numbers(label: str):
    how = head().naming(STARS)
    with pytest.raises(
        MetaPeftError, match=rf"Label '{label}' is no number, and labels were numbers .* class, 0 to 5\."
    ):
        classes(how, label)


def test_a_number_that_the_head_does_not_have():
    for label in (7, 7.0, "7"):
        with pytest.raises(MetaPeftError, match="A label is class 7, and the head has the classes 0 to 5"):
            classes(head().naming(STARS), label)
    with pytest.raises(MetaPeftError, match="A label is class -1, and the head has"):
        classes(head().naming(STARS), "-1")


def test_numbers_in_one_split_and_their_text_in_another():
    """Training in JSON and validation in CSV."""
    assert classes(head().naming([*STARS, *map(str, STARS)]), "5", "1") == [5, 1]
    mixed = head().naming([1, 2, "good"])
    assert mixed.facts.label_names == ("good",)
    assert mixed.facts.labels == "names"


def test_a_column_of_whole_numbers_that_lacks_some():
    """A table keeps it as floats."""
    assert classes(head(2), 0.0, 1.0, np.float64(1)) == [0, 1, 1]
    with pytest.raises(MetaPeftError, match=r"must be the name of a class or its number; got 0\.5"):
        classes(head(2).naming([0.0, 0.5]), 0.5)
    names = head(3, label_names=("1", "2", "3"))
    with pytest.raises(MetaPeftError, match=r"A label is the number 1, .* give it as text, '1'"):
        classes(names, 1.0)


def test_text_in_training_makes_names():
    """They are numbered as ever, over all tasks or in each."""
    shared = head(5).naming(map(str, STARS))
    assert (shared.facts.label_names, shared.facts.labels) == (("1", "2", "3", "4", "5"), "names")
    assert classes(shared, "1", "5") == [0, 4]
    assert classes(head(2).naming(map(str, STARS)), "4", "5") == [0, 1]


# ---- numbers that are not kept


def test_ids_are_names_of_a_task():
    """Where training gives classes other numbers, in whichever file they stand; ids are in their own order."""
    how = head(3).naming([10_001, 10_002, 99, 7], kept=False)
    assert how.facts.label_names == ()
    assert how.of_task(rows(10_001, 99, 99)).facts.label_names == ("99", "10001")
    assert classes(how, 10_001, 99, 99) == [1, 0, 0]
    assert classes(how, 10_001.0, 99.0) == [1, 0]
    assert classes(how, "10002", "10001") == [1, 0]
    assert classes(how, 1, 501) == [0, 1], "one of which could be a number"
    assert classes(how, -1, 1) == [0, 1]
    assert classes(how, "good", "bad") == [1, 0], "any names"
    with pytest.raises(MetaPeftError, match=r"4 names of classes.*the head has 3 classes"):
        classes(how, 10_001, 10_002, 99, 7)


def test_ids_that_the_head_has_are_its_classes():
    how = head(3).naming([0, 1, 2], kept=False)
    assert classes(how, 2, 1) == [2, 1]
    assert classes(how, np.int64(2), True) == [2, 1]


# ---- adapters of earlier versions


def test_text_that_may_be_a_number_where_that_was_not_written_down():
    old = head(labels="unknown")
    assert classes(old, *STARS) == STARS
    assert classes(old, "good", "bad") == [1, 0]
    assert classes(old, "10001", "10002") == [0, 1], "no number of this head"
    with pytest.raises(MetaPeftError, match=r"Label '1' may be .* earlier version.* numbers, .*, such as 'class 1'"):
        classes(old, "1", "5")
    shared = head(labels="unknown", label_names=("1", "2"))
    assert classes(shared, "1", "2") == [0, 1], "names that are known"


def test_what_labels_were_is_one_of_a_few_things():
    with pytest.raises(MetaPeftError, match="labels must be one of names, numbers, ids, unknown; got 'number'"):
        Facts(labels="number")


# ---- how many


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        (STARS, 6),
        ([0.0, 2.0], 3),
        ([[0, 3], [1]], 4),
        (["a", "b", "a"], 2),
        ([9], 10),
        ([-1, 1], 2),
        ([True, False], 2),
        ([], 0),
        ([0.5], 0),
    ],
)
def test_class_count(labels: list[Any], count: int):
    assert class_count(labels) == count


@pytest.mark.parametrize("labels", [[501, 502, 503], [[10_001], [10_002, 10_003]], [501.0, 502.0, 503.0], [0, 1, 503]])
def test_numbers_that_are_far_apart(labels: list[Any]):
    """They are ids of something, and would make a head of classes that nothing has."""
    largest = 10_003 if isinstance(labels[0], list) else 503
    with pytest.raises(
        MetaPeftError,
        match=rf"for 3 of them, of which the largest is {largest}, .* {largest + 1} classes\. Number them from 0, or make",
    ):
        class_count(labels)
