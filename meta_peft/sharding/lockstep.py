"""All processes gather the same weights in the same order, so all of them run equally many forwards.

A process that has fewer tasks in an outer step runs as many as the others, with weight zero for what it has not. How
many tasks go through the model at once, and what is kept of the inner steps, is the same everywhere and never changed
by how much memory one process has.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from meta_peft.errors import MetaPeftError
from meta_peft.outer_loop.memory_plan import MemoryPlan


def rounds_in_step(n_own_tasks: int, device: torch.device | str = "cpu") -> int:
    """How many tasks each process has to run in this outer step: the most that any of them has. All processes call it."""
    if not dist.is_initialized():
        return n_own_tasks
    most = torch.tensor(n_own_tasks, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def check_even(tasks_per_step: int, shares: int) -> None:
    """Raise `MetaPeftError` unless the tasks of an outer step come to equally many in each of `shares` shares.

    Args:
        tasks_per_step: of all processes together.
        shares: processes times the batches that each accumulates.
    """
    if tasks_per_step % shares:
        raise MetaPeftError(
            f"{tasks_per_step} tasks per outer step do not come to equally many in each of {shares} shares (processes times"
            f" gradient_accumulation_steps), and with a sharded base all processes run the same forwards: take"
            f" {-(-tasks_per_step // shares) * shares} tasks per step."
        )


class LockstepPlan(MemoryPlan):
    """A fixed number of tasks at once, all of a step by default.

    Where memory runs out in one process there is no smaller number that the others would know of.
    """

    def __init__(self, tasks_per_forward: int | None = None):
        super().__init__(tasks_per_forward, budget=math.inf)

    def shrink(self, n_tasks: int) -> bool:
        raise MetaPeftError(
            f"Memory ran out with {n_tasks} tasks at once. With a sharded base every process has to run the same forwards,"
            f" so none can go on with fewer: set tasks_per_forward below {n_tasks}, or shorten rows (max_length), or use"
            " memory='replay'."
        )
