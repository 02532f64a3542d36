"""Memory of a process, as Linux counts it.

``VmHWM`` is the most memory the process ever had at once, and can be set back; so a peak belongs to what ran since
then. Python's and torch's own counters miss each other's memory, this one misses nothing.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

GIB = 1 << 30


def resident(process: int | str = "self") -> int:
    """Bytes of memory that the process has now."""
    return _status(process, "VmRSS")


def peak() -> int:
    """The most bytes this process had at once since `reset_peak`."""
    return _status("self", "VmHWM")


def reset_peak() -> bool:
    """Start counting the peak anew, where the system lets us; says whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Collect garbage and return freed memory to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available() -> int:
    """Bytes that the machine can still hand out."""
    return _kilobytes(Path("/proc/meminfo").read_text(), "MemAvailable")


def total() -> int:
    return _kilobytes(Path("/proc/meminfo").read_text(), "MemTotal")


def _status(process: int | str, key: str) -> int:
    return _kilobytes(Path(f"/proc/{process}/status").read_text(), key)


def _kilobytes(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"The system does not count {key}: these benchmarks measure memory on Linux only.")
    return int(found[1]) * 1024
