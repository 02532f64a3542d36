from __future__ import annotations

import pytest
from babel import localedata

from meta_peft.tasks.leakage import find_leakage
from meta_peft.tasks.locale_formatting import ROWS_PER_TASK, SPLITS, locale_formatting
from meta_peft.tasks.task_set import TaskSet


@pytest.fixture(scope="session")
def everything() -> dict[str, TaskSet]:
    """All locales, letters included: several seconds, once."""
    return locale_formatting(digits_only=False)


@pytest.fixture
def some_locales(monkeypatch) -> None:
    """Every twentieth locale, so that a test can make the tasks more than once."""
    every = sorted(localedata.locale_identifiers())
    monkeypatch.setattr(localedata, "locale_identifiers", lambda: every[::20])


def contents(splits: dict[str, TaskSet]) -> dict:
    return {
        split: ({t: r.tolist() for t, r in tasks.rows_of.items()}, tasks.dataset.to_dict())
        for split, tasks in splits.items()
    }


def test_there_are_many_tasks(everything):
    assert list(everything) == list(SPLITS) == ["train", "validation", "test"]
    assert sum(len(tasks) for tasks in everything.values()) > 1100
    assert all(len(rows) == ROWS_PER_TASK for tasks in everything.values() for rows in tasks.rows_of.values())


def test_no_language_is_on_two_sides(everything):
    languages = {s: {n.split("/")[0].split("_")[0] for n in tasks.names} for s, tasks in everything.items()}
    assert all(languages.values())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not languages[one] & languages[other]
        everything[one].check_disjoint(everything[other])
    share = len(languages["train"]) / sum(len(found) for found in languages.values())
    assert share == pytest.approx(SPLITS["train"], abs=0.02)


def test_no_task_is_on_two_sides_under_another_name(some_locales):
    found = find_leakage(locale_formatting(digits_only=False))
    assert not found.tasks, found


def test_no_behaviour_is_on_two_sides(everything):
    """Tasks of one kind are asked for the same values, so equal answers throughout mean an equal task."""
    behaviour: dict[tuple, str] = {}
    questions: dict[str, tuple] = {}
    for tasks in everything.values():
        columns = tasks.dataset.to_dict()
        for name, rows in tasks.rows_of.items():
            kind = name.split("/")[1]
            asked = tuple(columns["input"][i] for i in rows)
            assert questions.setdefault(kind, asked) == asked
            key = (kind, *(columns["target"][i] for i in rows))
            assert key not in behaviour, f"{name} is {behaviour.get(key)}"
            behaviour[key] = name
    assert len(questions) == 10
    assert all(len(set(asked)) == ROWS_PER_TASK for asked in questions.values())


def test_known_answers(everything):
    """A few, by hand: one task writes dates as in Germany; the first locale of a behaviour gives the task its name."""

    def german(row: dict[str, str]) -> bool:
        return row["target"] == ".".join(reversed(row["input"].split("-")))

    dates = [(tasks, name) for tasks in everything.values() for name in tasks.names if "/date_" in name]
    assert sum(all(map(german, tasks.rows(name))) for tasks, name in dates) == 1
    targets = [row["target"] for t in everything.values() for row in t.rows(t.names[0])]
    assert not any(character in "\u200e\u200f\u061c\u00a0\u202f" for target in targets for character in target)


@pytest.mark.usefixtures("some_locales")
def test_digits_only_has_no_letters():
    splits, all_splits = locale_formatting(), locale_formatting(digits_only=False)
    answers = [a for tasks in splits.values() for a in tasks.dataset["target"]]
    assert answers
    assert not [a for a in answers if any(c.isalpha() for c in a)]
    names, all_names = ({n for tasks in s.values() for n in tasks.names} for s in (splits, all_splits))
    assert len(names) < len(all_names)
    lettered = [n for tasks in all_splits.values() for n in tasks.names if n not in names]
    assert any("date_full" in name for name in lettered)


@pytest.mark.usefixtures("some_locales")
def test_the_seed_decides_everything():
    one = contents(locale_formatting(seed=1))
    assert contents(locale_formatting(seed=1)) == one
    assert contents(locale_formatting(seed=2)) != one
