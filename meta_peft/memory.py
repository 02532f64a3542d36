"""Memory: how much there is, how it runs out, and how the C library hands it out."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
CGROUP = Path("/sys/fs/cgroup")


def keep_freed_memory() -> None:
    """Let glibc keep memory that was freed, instead of giving each large block back to the system.

    Logits and their gradients are large and made anew at every step; asking the system for the same pages each time
    costs as much as computing with them. Called by programs, never by the library: it holds for the whole process.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such option
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def available(device: torch.device) -> int:
    """Bytes that could still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    try:  # a container may be allowed less than the machine has
        allowed, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return free if allowed.strip() == "max" else min(free, int(allowed) - int(used))
    except (OSError, ValueError):
        return free


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
