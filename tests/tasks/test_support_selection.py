from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import support_selection
from meta_peft.tasks.episodes import EpisodeDataset
from meta_peft.tasks.support_selection import SupportSelection, balanced, k_center, most_uncertain
from meta_peft.tasks.task_set import TaskSet

LABELS = [3, 3, 3, 3, 3, 3, 4, 4, 5, 5]


def tasks(n_rows: int = 10) -> TaskSet:
    """Rows as they are after encoding, the answer a label."""
    rows = [
        {"task": f"task {t}", "input": f"{t}.{i}", "target": "x", "input_ids": [1, i], "labels": [-100, LABELS[i % 10]]}
        for t in range(3)
        for i in range(n_rows)
    ]
    return TaskSet.from_rows(rows)


class NumberView:
    """A view that says of a row what its number says, and counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def vectors(self, rows):
        self.asked += 1
        return np.array([[row["input_ids"][1], 0.0] for row in rows])

    def uncertainty(self, rows):
        self.asked += 1
        return np.array([float(row["input_ids"][1] % 7) for row in rows])


def dataset(how: str | None, of: TaskSet | None = None, **options) -> EpisodeDataset:
    selection = None if how is None else SupportSelection(how, NumberView())
    defaults = {"shots": 4, "query_size": 3, "seed": 3, "length": 30}
    return EpisodeDataset(tasks() if of is None else of, selection=selection, **defaults | options)


@pytest.mark.parametrize("how", ["balanced", "diverse", "uncertain"])
def test_query_rows_are_the_same_for_every_selection(how: str):
    random, selected = dataset(None), dataset(how)
    for i in range(30):
        assert selected[i].query == random[i].query
        assert selected[i].task == random[i].task
        support = [row["input"] for row in selected[i].support]
        assert len(set(support)) == 4
        assert not set(support) & {row["input"] for row in selected[i].query}
        assert all(row["task"] == selected[i].task for row in selected[i].support)


@pytest.mark.parametrize("how", ["balanced", "diverse", "uncertain"])
def test_an_episode_is_a_function_of_the_seed_and_its_number(how: str):
    forwards = dataset(how)
    backwards = dataset(how)
    found = [backwards[i] for i in reversed(range(30))]
    assert [forwards[i] for i in range(30)] == found[::-1]


def test_balanced_goes_over_the_answers():
    for i in range(30):
        episode = dataset("balanced")[i]
        answers = Counter(row["labels"][1] for row in episode.support)
        left = Counter(LABELS) - Counter(row["labels"][1] for row in episode.query)
        for label, count in answers.items():  # never more of one while another one has rows left
            assert count == 1 or all(answers[o] >= count - 1 or answers[o] == left[o] for o in left), (answers, label)


def test_balanced_is_random_within_an_answer():
    drawn = {tuple(balanced(LABELS, 3, np.random.default_rng(seed))) for seed in range(60)}
    assert len(drawn) > 20
    assert all({LABELS[i] for i in rows} == {3, 4, 5} for rows in drawn)


def test_k_center_is_the_greedy_one():
    vectors = np.random.default_rng(0).normal(size=(40, 5))
    found = list(k_center(vectors, 8))
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert found[0] == np.linalg.norm(vectors - vectors.mean(0), axis=1).argmin()
    for n in range(1, 8):
        assert found[n] == distance[:, found[:n]].min(1).argmax()
    radius = distance[:, found].min(1).max()
    others = [distance[:, np.random.default_rng(s).choice(40, 8, replace=False)].min(1).max() for s in range(200)]
    assert radius < np.quantile(others, 0.05)


def test_rows_that_are_alike_are_taken_once_each():
    assert sorted(k_center(np.ones((5, 2)), 5)) == [0, 1, 2, 3, 4]


def test_the_most_uncertain():
    assert list(most_uncertain(np.array([0.1, 3.0, np.nan, 3.0, -1.0]), 3)) == [2, 1, 3]


def test_a_task_is_looked_at_once_and_a_large_one_in_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(support_selection, "LARGEST", 12)
    large = tasks(60)
    episodes = dataset("diverse", of=large, shots=2, query_size=1, length=60)
    support = {row["input"] for episode in episodes for row in episode.support if episode.task == "task 1"}
    assert episodes.selection._view.asked == 3
    looked_at, _ = episodes.selection._known["task 1"]
    assert len(looked_at) == 12
    assert {int(name.split(".")[1]) for name in support} <= {
        list(large.rows_of["task 1"]).index(60 + i) for i in looked_at
    }


def test_what_cannot_be():
    with pytest.raises(MetaPeftError, match=r"got 'divers'\. Did you mean 'diverse'"):
        SupportSelection("divers")
    with pytest.raises(MetaPeftError, match="Random support needs no SupportSelection"):
        SupportSelection("random")
    with pytest.raises(MetaPeftError, match="'uncertain' asks the base model: give a view"):
        SupportSelection("uncertain")
