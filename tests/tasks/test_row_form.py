"""Rows in the form of an earlier run: with its names of columns, or translations."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from meta_peft import MetaPeftError, TaskSet
from meta_peft.tasks.row_form import RowForm, with_new_names

FORM = RowForm({"sentence": "text", "mood": "label", "customer": "task"})
OLD = {"sentence": "a", "mood": "good", "customer": "acme", "id": "1"}
NEW = {"text": "a", "label": "good", "task": "acme", "id": "1"}


def table_of(row: dict[str, str], form: RowForm = FORM) -> dict[str, str]:
    return form.of_table(Dataset.from_list([row]), ["task"])[0][0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (OLD, NEW),
        (NEW, NEW),
        (OLD | {"text": "other"}, NEW),  # as in training: what has a new name by itself is given up
        ({"sentence": "a", "label": "good"}, {"text": "a", "label": "good"}),
        (NEW | {"mood": "of the day"}, NEW | {"mood": "of the day"}),  # there under its new name already
    ],
)
def test_new_names_where_the_old_ones_are_there(row: dict[str, str], expected: dict[str, str]):
    assert FORM.of_rows([row]) == [expected]
    assert table_of(row) == expected


def test_names_that_change_places():
    form = RowForm({"input": "target", "target": "input"})
    row = {"input": "a", "target": "b"}
    assert form.of_rows([row]) == [table_of(row, form)] == [{"input": "b", "target": "a"}]


def test_a_row_that_lacks_a_column_keeps_the_others():
    assert FORM.renamed_rows([OLD, {"sentence": "b"}]) == [NEW, {"text": "b"}]


def test_columns_of_tasks_have_new_names_too():
    table = Dataset.from_list([OLD])
    for columns in (["task"], ["customer"]):
        assert FORM.of_table(table, columns)[1] == ["task"]
        assert TaskSet.of(table, columns, row_form=FORM).names == ["acme"]
    with pytest.raises(MetaPeftError, match="Expected a column 'client'"):
        TaskSet.of(table, "client", row_form=FORM)


def test_translations_are_pairs():
    form = RowForm({"pair": "translation"}, translation=True, target_lang="en")
    rows = [{"pair": {"de": "eins", "en": "one"}}, {"pair": {"de": "zwei", "en": "two"}}]
    expected = [
        {"input": "eins", "target": "one", "task": "de-en"},
        {"input": "zwei", "target": "two", "task": "de-en"},
    ]
    assert form.of_rows(rows) == expected
    assert list(form.of_table(Dataset.from_list(rows), ["task"])[0]) == expected
    assert form.of_rows(expected) == expected, "in a known form already"
    assert RowForm().of_rows(rows) == rows


def test_what_is_kept_with_the_tasks():
    tasks = TaskSet.of([OLD | {"customer": name} for name in "ab"], row_form=FORM)
    assert tasks.select(["b"]).row_form == FORM
    assert TaskSet.of([NEW]).row_form == RowForm()


def test_in_words():
    assert str(RowForm()) == ""
    assert str(RowForm({"a": "b", "c": "d"})) == "columns renamed a=b c=d"
    form = RowForm({"a": "b"}, translation=True, source_lang="de", target_lang="en")
    assert str(form) == "columns renamed a=b, translations from de into en"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_names": [["a", "b"]]}, "rename_columns must give each column another name"),
        ({"new_names": {"a": "x", "b": "x"}}, "rename_columns must give each column another name"),
        ({"new_names": {"a": 3}}, "rename_columns must be a text"),
        ({"new_names": {"a": "\x1b[2J"}}, "rename_columns must be a text"),
        ({"translation": "yes"}, "translation must be true or false"),
        ({"source_lang": 3}, "source_lang must be a text"),
        ({"target_lang": ""}, "target_lang must be a text"),
    ],
)
def test_what_cannot_be(values: dict[str, Any], message: str):
    with pytest.raises(MetaPeftError, match=message):
        RowForm.of(values)


def test_a_table_with_new_names():
    table = Dataset.from_list([{"a": "1", "b": "2"}])
    assert with_new_names(table, {}) is table
    assert with_new_names(table, {"a": "b"})[0] == {"b": "1"}
