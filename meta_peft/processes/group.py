"""What the processes of a job tell each other. Alone, a process talks to itself; nothing else has to know."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from meta_peft.errors import MetaPeftError

Result = TypeVar("Result")


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if _together() else 0


def summed(vector: Tensor) -> Tensor:
    """The sum of every process's vector, in one reduction."""
    if _together():
        vector = vector.clone()
        dist.all_reduce(vector)
    return vector


def gathered(rows: Tensor) -> list[Tensor]:
    """Every process's tensor, by rank; all have the same shape."""
    if not _together():
        return [rows]
    found = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(found, rows.contiguous())
    return found


def gathered_objects(value: Any) -> list[Any]:
    """Every process's value, by rank. It is pickled, and read by processes of the same job alone."""
    if not _together():
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def of_first(compute: Callable[[], Result]) -> Result:
    """What `compute` gives or raises in process 0, which alone calls it."""
    found: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            found = compute()
        except Exception as raised:
            error = _sendable(raised)
    found, error = gathered_objects((found, error))[0]
    if error is not None:
        raise error
    return found


def _sendable(error: Exception) -> Exception:
    """The error, or its words where it cannot go to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return MetaPeftError(f"{type(error).__name__}: {error}")
    return error


def from_first(vector: Tensor) -> Tensor:
    """The vector of process 0."""
    if _together():
        vector = vector.clone()
        dist.broadcast(vector, 0)
    return vector


def leave() -> None:
    """The end of the job for this process, or for the group: an open connection may end it with an error instead."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
