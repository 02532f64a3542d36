from __future__ import annotations

from collections import Counter

import pytest

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.episodes import EpisodeDataset
from meta_peft.tasks.task_set import TaskSet

TASKS = {f"task {t}": [{"input": f"{t}.{i}", "target": "x"} for i in range(4 + t)] for t in range(5)}


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    return TaskSet.from_mapping(TASKS)


def dataset(tasks: TaskSet, **options) -> EpisodeDataset:
    return EpisodeDataset(tasks, **{"shots": 2, "query_size": 2, "seed": 3, "length": 40, **options})


def test_an_episode_is_a_function_of_the_seed_and_its_number(tasks: TaskSet):
    """Two instances, read in opposite orders, one of them longer: as a resumed run or another worker would."""
    one = [dataset(tasks)[i] for i in range(40)]
    other = dataset(TaskSet.from_mapping(TASKS), length=1000)
    assert [other[i] for i in reversed(range(40))] == one[::-1]
    assert [dataset(tasks, seed=4)[i] for i in range(40)] != one


def test_support_and_query_never_share_a_row(tasks: TaskSet):
    for i in range(40):
        episode = dataset(tasks)[i]
        drawn = [row["input"] for row in episode.support + episode.query]
        assert len(set(drawn)) == 4
        assert (len(episode.support), len(episode.query)) == (2, 2)
        assert all(row["task"] == episode.task for row in episode.support + episode.query)


def test_rows_are_drawn_anew_and_all_of_them(tasks: TaskSet):
    episodes = [dataset(tasks, length=400)[i] for i in range(400)]
    drawn = {row["input"] for e in episodes for row in e.support}
    assert drawn == {row["input"] for its_rows in TASKS.values() for row in its_rows}
    assert len({tuple(r["input"] for r in e.support) for e in episodes if e.task == "task 4"}) > 20


def test_each_round_visits_every_task_once(tasks: TaskSet):
    names = [dataset(tasks)[i].task for i in range(40)]
    rounds = [names[i : i + 5] for i in range(0, 40, 5)]
    assert all(set(r) == set(TASKS) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # in a new order each time
    assert set(Counter(names).values()) == {8}


def test_without_shuffle_tasks_come_in_order(tasks: TaskSet):
    ordered = dataset(tasks, shuffle=False, length=10)
    assert [ordered[i].task for i in range(10)] == list(TASKS) * 2


def test_length(tasks: TaskSet):
    one_each = EpisodeDataset(tasks, shots=1, query_size=1)
    assert len(one_each) == 5
    assert len(list(one_each)) == 5
    for i in (-1, 5):
        with pytest.raises(IndexError):
            one_each[i]


@pytest.mark.parametrize("size", [{"shots": 0}, {"query_size": 0}])
def test_episodes_without_rows(tasks: TaskSet, size: dict):
    with pytest.raises(MetaPeftError, match="shots and query_size must be 1 or more, got"):
        dataset(tasks, **size)


def test_tasks_without_enough_rows(tasks: TaskSet):
    with pytest.raises(MetaPeftError, match=r"Task 'task 0' has 4 distinct rows.*\(5 in all\)"):
        dataset(tasks, query_size=3)


def test_by_length_is_every_episode_shortest_support_first():
    lengths = {"a": [5, 1], "b": [2, 2], "c": [1, 4], "d": [1, 1]}
    rows = [
        {"task": task, "input": f"{task}{i}", "target": "x", "input_ids": [0] * n}
        for task, both in lengths.items()
        for i, n in enumerate(both)
    ]
    episodes = EpisodeDataset(TaskSet.from_rows(rows), shots=1, query_size=1)
    ordered = episodes.by_length()
    found = [len(e.support[0]["input_ids"]) for e in ordered]
    assert found == sorted(found)
    assert sorted(e.task for e in ordered) == list("abcd")
    assert all(e in list(episodes) for e in ordered)
