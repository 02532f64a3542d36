from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meta_peft.tasks import Labelling, PromptFormat, TaskSet
from meta_peft.tasks.sources.opening import rows_of_task
from meta_peft.tasks.written import written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (-0.0, "0"),
        (2.5, "2.5"),
        (1e20, "1e+20"),
        (float("inf"), "inf"),
        (True, "True"),
        ("3.0", "3.0"),
    ],
)
def test_whole_numbers_have_no_decimal_point(value: object, text: str):
    assert written(value) == text


def test_a_row_is_the_same_text_among_others_and_alone(tmp_path: Path):
    """A table keeps a column of 1, 2 and 2.5 as floats."""
    rows = [{"task": 7, "input": i, "target": t} for i, t in ((1, 2), (2, 3), (3, 2.5))]
    rows += [{"task": 7.5, "input": i, "target": 4} for i in (1, 2, 3)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = TaskSet.from_jsonl(tmp_path / "x.jsonl")
    assert tasks.names == ["7", "7.5"]
    assert tasks.rows("7")[0]["target"] == 2.0
    how = PromptFormat()
    assert [how.render(row) for row in tasks.rows("7")] == [how.render(row) for row in rows_of_task(rows[:3])]


def test_classes_that_are_numbers_are_in_their_order():
    rows = [{"task": "a", "text": f"{x}{y}", "label": x} for x in (10.0, 9.0, 0.5) for y in "pq"]
    tasks = TaskSet.from_rows(rows)
    classes = Labelling(3).classes(tasks)
    assert set(classes.within["a"]) == {"0.5", "9", "10"}
    drawn = classes.draw("a", 2, np.random.default_rng(0), None)
    assert [tasks.table["label"][int(numbers[0])] for numbers, _ in drawn] == [0.5, 9.0, 10.0]
