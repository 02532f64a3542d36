from __future__ import annotations

import datetime
from typing import Any

import pytest
from datasets import ClassLabel, Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import TaskSet

TEXT = {"input": "a", "target": "b"}


@pytest.mark.parametrize("value", [{"a": 1}, ["a"], [{"role": "user"}], b"a", datetime.date(2024, 3, 5)])
@pytest.mark.parametrize("column", ["input", "target"])
def test_what_is_no_text_is_named(column: str, value: Any):
    """Before anything is counted: an episode that finds too few rows would say another thing."""
    with pytest.raises(MetaPeftError, match=f"Column '{column}' must hold text or numbers; row 2 has .*Make a text of"):
        TaskSet.of([{"task": "t", **TEXT, column: v} for v in (None, value)], empty_rows="leave_out")


@pytest.mark.parametrize("value", ["a", 3, 2.5, True])
def test_texts_and_numbers(value: Any):
    assert TaskSet.of([{"task": "t", "input": "a", "target": value}]).rows("t")[0]["target"] == value


def test_a_question_has_a_context_of_text_and_answers_of_any_form():
    row = {"task": "t", "question": "a", "context": "c"}
    for answers in (["b"], {"text": ["b"], "answer_start": [0]}):
        assert len(TaskSet.of([{**row, "answers": answers}])) == 1
    with pytest.raises(MetaPeftError, match="Column 'context' must hold text or numbers; row 1 has"):
        TaskSet.of([{**row, "answers": ["b"], "context": ["c"]}])


def test_what_is_not_read_may_hold_anything():
    assert len(TaskSet.of([{"task": "t", **TEXT, "context": ["c"], "notes": {"a": 1}}])) == 1


def test_classes_of_a_dataset():
    table = Dataset.from_list([{"task": "t", "text": "a", "label": 1}]).cast_column(
        "label", ClassLabel(names=["n", "y"])
    )
    assert TaskSet(table).rows("t")[0]["label"] == "y"
