"""Memory of the process, on the CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>


def keep_freed_memory(n_bytes: int = 1 << 30) -> None:
    """Let glibc keep blocks up to `n_bytes` that were freed, instead of giving each back to the system.

    Logits and their gradients are large and made anew at every step; asking the system for the same pages each time
    costs as much as computing with them. Called by programs, never by the library: it holds for the whole process.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such option
        mallopt(M_MMAP_THRESHOLD, n_bytes)
        mallopt(M_TRIM_THRESHOLD, 2 * n_bytes - 1)
