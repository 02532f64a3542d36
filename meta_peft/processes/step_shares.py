"""What a process reads of each outer step: its share of the step's episodes.

The episodes of a step are numbered through, whatever the number of processes: step s has episodes ``s * T`` to
``(s + 1) * T``, cut into as many pieces of consecutive episodes as there are processes (times batches that are
accumulated); a process has the pieces that follow one another. Pieces may differ by one in size, and be empty, and so may
what the processes have in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from meta_peft.types import Episode, EpisodeBatch


@dataclass(frozen=True)
class Share:
    """What one process reads at once.

    Args:
        first: the place of the first episode within the outer step.
        batches: the episodes, in one batch or each in its own; none if there are none or they could not be read.
        error: why they could not be read. Whoever computes has to tell the others, which wait for its sum.
    """

    first: int
    batches: tuple[EpisodeBatch, ...] = ()
    error: Exception | None = None


class StepShares(Dataset[Share]):
    """The shares of one process, `turns` of them for each outer step.

    Args:
        episodes: as many as all steps need, `tasks_per_step` for each.
        collate: makes a batch of episodes.
        turns: how many shares a process accumulates in a step.
        processes: how many there are.
        process: which one this is.
        one_by_one: a batch for each episode, so that its padding does not depend on what it is read with.
    """

    def __init__(
        self,
        episodes: Dataset[Episode],
        collate: Callable[[Sequence[Episode]], EpisodeBatch],
        *,
        tasks_per_step: int,
        turns: int = 1,
        processes: int = 1,
        process: int = 0,
        one_by_one: bool = False,
    ):
        self.episodes, self.collate, self.tasks_per_step = episodes, collate, tasks_per_step
        self.turns, self.processes, self.process, self.one_by_one = turns, processes, process, one_by_one

    def __len__(self) -> int:
        return len(self.episodes) // self.tasks_per_step * self.turns  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Share]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Share:
        step, turn = divmod(i, self.turns)
        # A process has consecutive pieces: one of each turn may be the emptier one in all turns.
        piece, pieces = self.process * self.turns + turn, self.turns * self.processes
        first, last = (p * self.tasks_per_step // pieces for p in (piece, piece + 1))
        try:
            drawn = [self.episodes[step * self.tasks_per_step + place] for place in range(first, last)]
            together = [[episode] for episode in drawn] if self.one_by_one else [drawn] if drawn else []
            return Share(first, tuple(self.collate(episodes) for episodes in together))
        except Exception as error:
            return Share(first, error=error)


def only(shares: Sequence[Share]) -> Share:
    """The one item of a list: what a `DataLoader` with ``batch_size=1`` collates with."""
    (share,) = shares
    return share
