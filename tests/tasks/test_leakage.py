from __future__ import annotations

import logging
import unicodedata

import numpy as np
import pytest

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import leakage
from meta_peft.tasks.leakage import check_leakage, find_leakage
from meta_peft.tasks.task_set import TaskSet

WORDS = ["river", "stone", "cloud", "ember", "violet", "harbour", "copper", "meadow", "lantern", "orchid", "marble"]


def rows(seed: int, n: int = 12, words: int = 8, answers: int | None = None) -> list[dict[str, str]]:
    """Sentences of random words; the answers from another seed, if given."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed if answers is None else 1000 + answers)
    return [{"input": " ".join(rng.choice(WORDS, words)), "target": " ".join(other.choice(WORDS, 2))} for _ in range(n)]


def splits(train: dict, test: dict) -> dict[str, TaskSet]:
    return {"train": TaskSet.from_mapping(train), "test": TaskSet.from_mapping(test)}


def others(first: int, n: int = 5) -> dict[str, list]:
    return {f"other {seed}": rows(seed) for seed in range(first, first + n)}


def test_a_task_under_two_names():
    found = find_leakage(splits({**others(10), "a": rows(1)}, {**others(20), "b": rows(1)[::-1]}))
    (pair,) = found.tasks
    assert (pair.splits, pair.tasks) == (("train", "test"), ("a", "b"))
    assert (pair.same_rows, pair.same_inputs, pair.same_answers, pair.alike) == (1, 1, 1, 1)
    assert found.rows == {("train", "test"): 12}


def test_letters_that_are_composed_otherwise_hide_nothing():
    """As files from another system have them: é as one character, or as e and an accent."""
    composed = [{"input": f"café {row['input']}", "target": row["target"]} for row in rows(1)]
    apart = [{**row, "input": unicodedata.normalize("NFD", row["input"])} for row in composed]
    assert apart != composed
    found = find_leakage(splits({"a": composed}, {"b": apart}))
    assert found.rows == {("train", "test"): 12}
    said = [
        [{"messages": [{"role": "user", "content": r["input"]}, {"role": "assistant", "content": "Ja"}]} for r in part]
        for part in (composed, apart)
    ]
    assert find_leakage(splits({"a": said[0]}, {"b": said[1]})).rows == {("train", "test"): 12}


def test_case_and_white_space_hide_nothing():
    shouted = [{"input": f"  {row['input'].upper()}\n", "target": row["target"].title()} for row in rows(1)]
    (pair,) = find_leakage(splits({"a": rows(1)}, {"b": shouted})).tasks
    assert pair.same_rows == 1


def test_half_of_the_rows():
    mixed = rows(1)[:6] + rows(2)[:6]
    (pair,) = find_leakage(splits({"a": rows(1)}, {**others(20), "b": mixed})).tasks
    assert pair.same_rows == 0.5
    fewer = rows(1)[:5] + rows(2)[:7]
    found = find_leakage(splits({"a": rows(1)}, {"b": fewer}))
    assert found.tasks == []
    assert found.rows == {("train", "test"): 5}


def test_edited_rows_are_found_by_their_text():
    """One word of each row is another one, so no row is the same."""
    edited = [{**row, "input": f"{row['input']} {WORDS[i % 3]}"} for i, row in enumerate(rows(1, words=20))]
    (pair,) = find_leakage(splits({**others(10), "a": rows(1, words=20)}, {**others(20), "b": edited})).tasks
    assert pair.tasks == ("a", "b")
    assert pair.same_rows == 0
    assert 0.8 <= pair.alike < 1


def test_the_same_inputs_with_other_answers_are_another_task():
    """As in tasks that write the same dates the way of two languages."""
    found = find_leakage(splits({"a": rows(1, words=20)}, {"b": rows(1, words=20, answers=7)}))
    assert found.tasks == []


def test_similarity_is_that_of_the_sets():
    one, other = rows(1), rows(1)[:8] + rows(3)[:4]
    (pair,) = find_leakage(splits({"a": one}, {"b": other})).tasks

    def grams(its_rows: list[dict[str, str]]) -> set[str]:
        lines = [f"{row['input']}\t{row['target']}" for row in its_rows]
        return {line[i : i + 8] for line in lines for i in range(len(line) - 7)}

    assert pair.alike == pytest.approx(len(grams(one) & grams(other)) / len(grams(one) | grams(other)))


def test_conversations():
    def talk(its_rows: list[dict[str, str]]) -> list[dict]:
        return [
            {"messages": [{"role": "user", "content": r["input"]}, {"role": "assistant", "content": r["target"]}]}
            for r in its_rows
        ]

    found = find_leakage(splits({"a": talk(rows(1))}, {"b": talk(rows(1)), "c": talk(rows(2))}))
    assert [pair.tasks for pair in found.tasks] == [("a", "b")]


def test_questions_about_other_texts_are_other_rows():
    """As where a domain asks the same of each of its texts."""

    def asked(its_rows: list[dict[str, str]]) -> list[dict[str, str]]:
        question, answers = "Is the review positive?", ("yes", "no")
        return [
            {"context": row["input"], "question": question, "answer": answers[i % 2]} for i, row in enumerate(its_rows)
        ]

    found = find_leakage(splits({"books": asked(rows(1))}, {"films": asked(rows(2)), "novels": asked(rows(1))}))
    assert [pair.tasks for pair in found.tasks] == [("books", "novels")]
    assert found.rows == {("train", "test"): 12}


def test_a_context_that_is_not_there_hides_nothing():
    asked = [{"question": row["input"], "answer": row["target"]} for row in rows(1)]
    for nothing in (None, ""):
        found = find_leakage(splits({"a": asked}, {"b": [{**row, "context": nothing} for row in asked]}))
        assert [pair.same_rows for pair in found.tasks] == [1]


def test_questions_with_other_choices_are_other_rows():
    def asked(its_rows: list[dict[str, str]]) -> list[dict]:
        return [
            {"input": "Which one?", "choices": [row["input"], row["target"]], "target": i % 2}
            for i, row in enumerate(its_rows)
        ]

    found = find_leakage(splits({"a": asked(rows(1))}, {"b": asked(rows(2)), "c": asked(rows(1))}))
    assert [pair.tasks for pair in found.tasks] == [("a", "c")]


def test_one_pair_among_a_thousand_tasks():
    train = {f"train {seed}": rows(seed, n=6) for seed in range(600)}
    test = {f"test {seed}": rows(seed, n=6) for seed in range(600, 1000)}
    test["planted"] = rows(123, n=6)
    found = find_leakage(splits(train, test))
    assert [pair.tasks for pair in found.tasks] == [("train 123", "planted")]


def test_short_rows():
    tiny = [{"input": str(i), "target": "é"} for i in range(4)]
    (pair,) = find_leakage(splits({"a": tiny}, {"b": tiny})).tasks
    assert pair.alike == 1


def test_what_is_done_about_it(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    leaking = splits({"a": rows(1)}, {"b": rows(1)})
    with caplog.at_level(logging.INFO, logger="meta_peft"):
        assert check_leakage(leaking, "warn").to_dict()["tasks"][0]["tasks"] == ("a", "b")
        assert "1 pair of tasks in different splits is nearly the same: 'a' (train) and 'b' (test), 100%" in caplog.text
        caplog.clear()
        assert check_leakage(leaking, "ignore").tasks == []
        assert check_leakage(splits(others(1), others(10)), "error").tasks == []
        assert caplog.text == ""
        with pytest.raises(MetaPeftError, match="Take one of each pair out, or set task_leakage=warn"):
            check_leakage(leaking, "error")
        monkeypatch.setattr(leakage, "READ_UNASKED", 20)
        assert check_leakage(leaking, "warn").tasks == []
        assert "24 rows are too many to look for tasks in two splits unasked" in caplog.text
        with pytest.raises(MetaPeftError, match="nearly the same"):
            check_leakage(leaking, "error")
