"""Counts of what torch computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


class CountedRows(TorchDispatchMode):
    """While active: how many rows are multiplied with `weight` or with its transpose."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.rows = 0
        self._weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            left, right = args[-2:]
            if right.untyped_storage().data_ptr() == self._weight:
                self.rows += left.shape[0]
        return function(*args, **(kwargs or {}))
