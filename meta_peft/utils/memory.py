"""How much memory there is, and how it runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
Result = TypeVar("Result")


def available(device: torch.device) -> int:
    """Bytes that could still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    try:  # a container may be allowed less than the machine has
        allowed, used, stat = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        counts = dict(line.split() for line in stat.splitlines())
        cached = int(counts.get("inactive_file", 0))  # counted as used, and given up where memory is needed
        return free if allowed.strip() == "max" else min(free, int(allowed) - int(used) + cached)
    except (OSError, ValueError):
        return free


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def or_out_of_memory(compute: Callable[[], Result]) -> Result | BaseException:
    """What `compute` returns, or the error that says memory ran out, without the frames that hold the memory."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        failure = error.with_traceback(None)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure
