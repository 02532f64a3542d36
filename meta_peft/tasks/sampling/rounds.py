"""Every task once in a round."""

from __future__ import annotations

import numpy as np

from meta_peft.tasks.sampling.rule import TaskSampling


class Rounds(TaskSampling):
    """
    Args:
        n_tasks: how many there are.
        seed: of the orders.
        shuffle: a new order each round; otherwise episode i is of task i, round after round.
    """

    def __init__(self, n_tasks: int, seed: int, shuffle: bool = True):
        self.n_tasks, self.seed, self.shuffle = n_tasks, seed, shuffle

    def task(self, i: int) -> int:
        round_, place = divmod(i, self.n_tasks)
        if not self.shuffle:
            return place
        return int(np.random.default_rng([self.seed, 0, round_]).permutation(self.n_tasks)[place])
