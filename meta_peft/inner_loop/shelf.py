"""Where tensors wait that are needed again only once, much later: outside the memory that models run in.

The inner loop's earlier fast weights and optimizer states wait here for the walk back. From a GPU they go to the host's
memory, from there to an unnamed temporary file, bit for bit.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from typing import IO

import numpy as np
import torch
from torch import Tensor

from meta_peft.types import Params


class Shelf:
    """`put` tensors, and get them again from the function that it returns."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def put(self, tensors: Params) -> Callable[[], Params]:
        places = {name: self._put(tensor.detach()) for name, tensor in tensors.items()}
        return lambda: {name: place() for name, place in places.items()}

    def _put(self, tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.device.type == "meta":  # it has a shape and no values
            return partial(torch.empty, tensor.shape, dtype=tensor.dtype, device="meta")
        if tensor.device.type != "cpu":
            device, copy = tensor.device, tensor.cpu()
            return lambda: copy.to(device)
        values = tensor.contiguous().numpy()
        try:
            if self._file is None:
                # It is gone with the shelf. Without a buffer, which would keep what the disk refused and fail again.
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            return _written(self._file, values)
        except OSError:  # no space left there: it has to stay in memory
            kept = tensor.clone()
            return lambda: kept


def _written(file: IO[bytes], values: np.ndarray) -> Callable[[], Tensor]:
    start, dtype, shape = file.seek(0, 2), values.dtype, values.shape
    left = values.reshape(-1).view(np.uint8).data
    while len(left):
        left = left[file.write(left) :]

    def read() -> Tensor:
        file.seek(start)
        return torch.from_numpy(np.fromfile(file, dtype, math.prod(shape)).reshape(shape))

    return read
