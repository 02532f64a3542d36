"""How the C library hands out memory."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>


def keep_freed_memory() -> None:
    """Let glibc keep memory that was freed, instead of giving each large block back to the system.

    Logits and their gradients are large and made anew at every step; asking the system for the same pages each time
    costs as much as computing with them. Called by programs, never by the library: it holds for the whole process. Who has
    set `MALLOC_MMAP_THRESHOLD_` for a process, as docs/memory.md tells for little memory, is left with what was asked for.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such option
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
