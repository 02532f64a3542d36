"""A gradient in a few numbers, such that inner products of gradients are about those of their sketches.

A sparse random projection (count sketch, Charikar et al. 2002): each entry of the gradient is added, with a random sign,
to one random place of the sketch. Inner products keep their expectation, and cosines of D numbers are right to about
``1 / sqrt(D)``. Nothing as large as a dense projection is stored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from meta_peft.params import flatten
from meta_peft.types import Params


class GradientSketch:
    """
    Args:
        numbers: D.
        seed: sketches can be compared if they have the same one.
    """

    def __init__(self, numbers: int, seed: int):
        self.numbers, self._seed = numbers, seed
        self._places = torch.zeros(0, dtype=torch.long)
        self._signs = torch.zeros(0)

    def __call__(self, gradient: Params) -> Tensor:
        """``[D]``, on the CPU, where the order of a sum is fixed."""
        values = flatten(gradient).detach().cpu().double()
        if len(self._places) != len(values):
            rng = np.random.default_rng([self._seed, 3])
            self._places = torch.from_numpy(rng.integers(self.numbers, size=len(values)))
            self._signs = torch.from_numpy(2.0 * rng.integers(2, size=len(values)) - 1)
        return torch.zeros(self.numbers, dtype=values.dtype).index_add(0, self._places, self._signs * values)
