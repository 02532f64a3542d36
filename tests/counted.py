"""Counts of what torch computes."""

from __future__ import annotations

from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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


class Alive:
    """While active: bytes of what autograd has saved and not freed yet, now and at most; each storage counts once.

    Beyond `limit` memory has run out, as on a device of that size.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        self.most = self.now = 0
        self._limit = limit
        self._users: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._note, lambda kept: kept.tensor)

    def __enter__(self) -> Alive:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        if isinstance(tensor, nn.Parameter):
            return kept
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._users:
            if self.now + size > self._limit:
                raise torch.OutOfMemoryError(f"Tried to allocate {size} bytes of {self._limit}, {self.now} are in use.")
            self.now += size
            self.most = max(self.most, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        finalize(kept, self._free, key, size)
        return kept

    def _free(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


class _Kept:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # or a result would keep the operation that saved it alive, and that the result
