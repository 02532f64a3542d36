from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import row_index
from meta_peft.tasks.row_index import RowIndex, full_rows, hash_rows, index_rows

COLUMNS = ("input", "target")


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_index, "ROWS_AT_ONCE", 3)


def index(rows: list[dict], tasks: tuple[str, ...] = ("task",), **options) -> RowIndex:
    return index_rows(Dataset.from_list(rows), tasks, COLUMNS, COLUMNS, **options)


def test_the_same_as_a_walk_over_all_rows():
    """Against the plain way, on rows that repeat often."""
    rng = np.random.default_rng(0)
    rows = [
        {"task": f"t{rng.integers(5)}", "input": "xyz"[rng.integers(3)], "target": str(rng.integers(3))}
        for _ in range(200)
    ]
    expected: dict[str, list[int]] = {}
    seen = set()
    for i, row in enumerate(rows):
        if tuple(row.values()) not in seen:
            expected.setdefault(row["task"], []).append(i)
            seen.add(tuple(row.values()))
    found = index(rows)
    assert {task: part.tolist() for task, part in found.rows_of.items()} == expected
    assert list(found.rows_of) == list(expected)  # in the order of their first rows
    assert found.repeated_rows == 200 - len(seen)


def test_rows_in_several_tasks():
    rows = [{"task": t, "input": i, "target": "x"} for t, i in (("a", "1"), ("b", "1"), ("b", "2"), ("b", "1"))]
    assert index(rows).rows_in_several_tasks == 2


def test_tasks_with_one_label():
    """Of rows of text and label; and not of tasks of one row, nor where the label is the task."""
    rows = [{"task": t, "text": str(i), "label": label} for i, (t, label) in enumerate(["ax", "ax", "by", "bz", "cx"])]
    table = Dataset.from_list(rows)
    columns = ("text", "label")
    assert index_rows(table, ("task",), columns, columns).single_label_tasks == 1
    assert index_rows(table, ("label",), columns, columns).single_label_tasks == 0
    assert index([{"task": "a", "input": i, "target": "x"} for i in "12"]).single_label_tasks == 0


def test_what_becomes_of_empty_rows_is_one_of_two_things():
    with pytest.raises(MetaPeftError, match="empty_rows must be one of error, leave_out; got 'leaveout'"):
        index([{"task": "a", "input": "1", "target": "x"}], empty_rows="leaveout")


def test_several_columns_name_a_task():
    rows = [{"who": who, "lang": lang, "input": "1", "target": "x"} for who in "ab" for lang in (1, 2)]
    assert list(index(rows, ("who", "lang")).rows_of) == ["a / 1", "a / 2", "b / 1", "b / 2"]
    rows = [{"who": "a / b", "lang": "c"}, {"who": "a", "lang": "b / c"}]
    with pytest.raises(MetaPeftError, match="Two tasks would have the name 'a / b / c'"):
        index([{**row, "input": "1", "target": "x"} for row in rows], ("who", "lang"))


EMPTY = [
    {"task": "a", "input": "1", "target": "x"},
    {"task": "a", "input": "", "target": "x"},
    {"task": "b", "input": "2", "target": None},
    {"task": "a", "input": "3", "target": "x"},
    {"task": None, "input": "4", "target": "x"},
    {"task": "", "input": "5", "target": "x"},
]


def test_empty_rows_are_left_out_if_asked_for():
    found = index(EMPTY, empty_rows="leave_out")
    assert {task: part.tolist() for task, part in found.rows_of.items()} == {"a": [0, 3]}
    assert found.empty_rows == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (EMPTY, "Row 2 has nothing in the column 'input': fill it, or leave such rows out with empty_rows: leave_out"),
        ([EMPTY[0], EMPTY[3], EMPTY[0], EMPTY[2]], "Row 4 has nothing in the column 'target'"),
        (EMPTY[3:], "Row 2 has None in the column 'task': name its task"),
        (EMPTY[5:], "Row 1 has '' in the column 'task'"),
        ([{**EMPTY[0], "task": ["a"]}], r"Row 1 has \['a'\] in the column 'task'"),
    ],
)
def test_empty_rows_are_an_error_by_default(rows: list[dict], message: str):
    with pytest.raises(MetaPeftError, match=message):
        index(rows)


def test_nothing_but_empty_rows():
    with pytest.raises(MetaPeftError, match="There are no rows"):
        index(EMPTY[1:3], empty_rows="leave_out")


def test_hashes_tell_rows_apart():
    """Whatever their types, and in which column a value stands."""
    columns = [pa.chunked_array([["a", "", "b", None]]), pa.chunked_array([["", "a", "b", "b"]])]
    assert len(set(hash_rows(columns, 4).tolist())) == 4
    for values in ([1, -1, -2, 10**12], [True, False], [["a", "b"], ["ab"], []], [{"x": 1}, {"x": 2}], [b"a", b"b"]):
        hashes = hash_rows([pa.chunked_array([values + values])], 2 * len(values))
        assert len(set(hashes.tolist())) == len(values)
        assert (hashes[: len(values)] == hashes[len(values) :]).all()


def test_hashes_are_the_same_in_every_process():
    """A number computed in another one."""
    assert hash_rows([pa.chunked_array([["a"]]), pa.chunked_array([[1]])], 1).tolist() == [11399807700178370582]


# ---- conversations


def chats(*last: dict) -> Dataset:
    turns = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
    return Dataset.from_list([{"task": "a", "messages": [*turns, turns[0], turn]} for turn in (turns[1], *last)])


@pytest.mark.parametrize(
    "turn",
    [{"role": "assistant", "content": ""}, {"role": "assistant", "content": None}, {"role": "user", "content": None}],
)
def test_a_conversation_with_a_turn_that_says_nothing_is_an_empty_row(turn: dict):
    table, columns = chats({"role": "assistant", "content": "three"}, turn), ("messages",)
    with pytest.raises(
        MetaPeftError, match=r"Row 3 has a turn without content, \{.*\}, in the column 'messages': fill it"
    ):
        index_rows(table, ("task",), columns, columns)
    found = index_rows(table, ("task",), columns, columns, empty_rows="leave_out")
    assert (found.rows_of["a"].tolist(), found.empty_rows) == ([0, 1], 1)


def test_a_turn_that_calls_a_tool_says_something():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    columns = ("messages",)
    assert index_rows(chats(call), ("task",), columns, columns).empty_rows == 0


def test_no_conversation_at_all():
    columns = ("messages",)
    said = [{"role": "assistant", "content": "x"}]
    for nothing in ([], None):
        table = Dataset.from_list([{"task": "a", "messages": turns} for turns in (said, nothing)])
        with pytest.raises(MetaPeftError, match="Row 2 has nothing in the column 'messages'"):
            index_rows(table, ("task",), columns, columns)


def test_which_rows_have_something():
    table = Dataset.from_list([{"x": value} for value in ("a", "", None, "b", "")])
    assert full_rows(table, "x").tolist() == [True, False, False, True, False]
    assert full_rows(Dataset.from_list([{"x": 0.0}, {"x": None}]), "x").tolist() == [True, False]
