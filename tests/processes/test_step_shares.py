from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from meta_peft.processes import StepShares
from meta_peft.processes.step_shares import only


class Numbers:
    """Episode i is the number i; the one named `bad` cannot be read."""

    def __init__(self, length: int, bad: int | None = None):
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> int:
        if i == self.bad:
            raise ValueError(f"row {i} is damaged")
        return i


def read(
    tasks: int, processes: int, turns: int = 1, steps: int = 3, **options
) -> list[list[tuple[int, list[list[int]]]]]:
    """By process, what each turn of it is."""
    found = []
    for process in range(processes):
        shares = StepShares(
            Numbers(steps * tasks),
            list,
            tasks_per_step=tasks,
            turns=turns,
            processes=processes,
            process=process,
            **options,
        )
        assert len(shares) == steps * turns
        found.append([(share.first, list(share.batches)) for share in shares])
    return found


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 4, 5])
@pytest.mark.parametrize("tasks", [1, 4, 5, 7])
def test_every_episode_of_a_step_is_read_once(tasks: int, processes: int, turns: int):
    found = read(tasks, processes, turns)
    for step in range(3):
        mine = [turn for process in found for turn in process[step * turns : (step + 1) * turns]]
        numbers = [n for _, batches in mine for batch in batches for n in batch]
        assert sorted(numbers) == list(range(step * tasks, (step + 1) * tasks))
        for first, batches in mine:
            for batch in batches:
                assert batch[0] == step * tasks + first
        sizes = [sum(map(len, batches)) for _, batches in mine]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("turns", [2, 3, 4])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("tasks", [4, 5, 8])
def test_no_process_has_more_than_one_task_more_than_another(tasks: int, processes: int, turns: int):
    """Once one of two had all of four tasks, where four batches were accumulated, and the other waited."""
    found = read(tasks, processes, turns, steps=1)
    sizes = [sum(len(batch) for _, batches in process for batch in batches) for process in found]
    assert max(sizes) - min(sizes) <= 1


def test_one_by_one():
    assert read(3, 1, steps=1, one_by_one=True) == [[(0, [[0], [1], [2]])]]
    assert read(3, 2, steps=1, one_by_one=True) == [[(0, [[0]])], [(1, [[1], [2]])]]


def test_what_cannot_be_read_is_an_error_to_pass_on():
    first, second = (
        StepShares(Numbers(8, bad=5), list, tasks_per_step=4, processes=2, process=process) for process in (0, 1)
    )
    assert first[0].error is None
    assert second[1].error is None
    assert first[1].batches == ()
    assert str(first[1].error) == "row 5 is damaged"


def test_worker_processes_pass_everything_on():
    shares = StepShares(Numbers(4, bad=3), list, tasks_per_step=2)
    first, second = DataLoader(shares, batch_size=1, collate_fn=only, num_workers=1)
    assert first.batches == ([0, 1],)
    assert isinstance(second.error, ValueError)
