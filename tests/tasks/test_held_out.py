from __future__ import annotations

import pytest
from surface import letter_rows, tiny_tokenizer

from meta_peft import MetaPeftError, PromptFormat, TaskSet
from meta_peft.tasks.held_out import held_out

SIZES = {"a": 8, "b": 5}


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    rows = {letter: letter_rows(letter, n) for letter, n in SIZES.items()}
    return TaskSet.from_mapping(rows).encoded(PromptFormat(), tiny_tokenizer(), 32)


@pytest.mark.parametrize(("asked", "given"), [(None, 3), (2, 2), (100, 3)])
def test_each_task_has_as_many_query_rows_as_the_smallest_can_give(tasks: TaskSet, asked: int | None, given: int):
    episodes = held_out(tasks, shots=2, query_size=asked)
    assert [episode.task for episode in (episodes[0], episodes[1])] == ["a", "b"]
    assert len(episodes) == 2
    assert all(len(episode.support) == 2 and len(episode.query) == given for episode in episodes)


def test_it_says_that_a_small_task_leaves_fewer_query_rows_for_all(tasks: TaskSet, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "meta_peft"):
        held_out(tasks, shots=4, query_size=77)
        held_out(tasks, shots=4)
        held_out(tasks, shots=3, query_size=2)
    assert [r.getMessage() for r in caplog.records] == [
        "Held-out tasks are judged on 1 query row each, not on 77: the smallest has no more besides 4 support rows. To have"
        " more, leave small tasks out, or lower shots."
    ]


def test_they_are_the_same_each_time_and_others_with_another_seed(tasks: TaskSet):
    first, again, other = (held_out(tasks, shots=2, seed=seed) for seed in (0, 0, 1))
    assert first[0] == again[0] != other[0]


def test_a_task_without_a_row_to_ask(tasks: TaskSet):
    with pytest.raises(MetaPeftError, match="Task 'b' has 5 distinct rows, but an episode takes 5 support rows and 1"):
        held_out(tasks, shots=5)
