from __future__ import annotations

import pytest
from datasets import Dataset, Features, Value

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import TaskSet
from meta_peft.tasks.translation import as_pairs, pairs_of_task

ROWS = [
    {"id": 1, "translation": {"de": "eins", "en": "one", "fr": None}},
    {"id": 2, "translation": {"de": None, "en": "two", "fr": "deux"}},
    {"id": 3, "translation": {"de": "drei", "en": "", "fr": None}},
]


def pairs(*languages: str | None, rows: list[dict] = ROWS) -> list[tuple]:
    found = as_pairs(Dataset.from_list(rows), *languages)
    return sorted((row["task"], row["input"], row["target"], row["id"]) for row in found)


def test_each_direction_is_a_task():
    everything = [
        ("de-en", "eins", "one", 1),
        ("en-de", "one", "eins", 1),
        ("en-fr", "two", "deux", 2),
        ("fr-en", "deux", "two", 2),
    ]
    assert pairs() == everything
    assert pairs("en") == [everything[1], everything[2]]
    assert pairs(None, "en") == [everything[0], everything[3]]
    assert pairs("de", "en") == everything[:1]


def test_rows_that_name_their_task_keep_it():
    assert [row[0] for row in pairs("de", "en", rows=[{**ROWS[0], "task": "numbers"}])] == ["numbers"]


def test_in_a_task_set():
    assert TaskSet(as_pairs(Dataset.from_list(ROWS))).names == ["de-en", "en-de", "en-fr", "fr-en"]


def test_what_is_no_translation():
    with pytest.raises(MetaPeftError, match=r"source_lang: deu is none of the languages de, en, fr. Did you mean 'de'"):
        pairs("deu")
    with pytest.raises(MetaPeftError, match=r"target_lang: x is none of the languages de, en, fr.$"):
        pairs(None, "x")
    with pytest.raises(MetaPeftError, match="are both en"):
        pairs("en", "en")
    table = Dataset.from_dict({"translation": ["eins"]}, features=Features({"translation": Value("string")}))
    with pytest.raises(MetaPeftError, match="The column 'translation' must hold texts by language"):
        as_pairs(table)


def test_the_rows_of_one_task():
    one = [{"input": "one", "target": "eins", "task": "en-de", "id": 1}]
    assert pairs_of_task(ROWS, "en", "de", task_column="task") == one
    assert pairs_of_task(one, "en", "de", task_column="task") == one, "no translations any more"
    both = pairs_of_task([ROWS[0] | {"task": "numbers"}], task_column="task")
    assert [row["task"] for row in both] == ["numbers", "numbers"], "they say themselves that they are one task"
    with pytest.raises(
        MetaPeftError, match=r"in the directions de-en, en-de, en-fr and fr-en, each of which is a task"
    ):
        pairs_of_task(ROWS, task_column="task")
    with pytest.raises(MetaPeftError, match="The column 'translation' must hold texts by language"):
        pairs_of_task([{"translation": "eins"}], task_column="task")
