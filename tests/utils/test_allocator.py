from __future__ import annotations

import ctypes
import sys

import pytest
from surface import run_python

from meta_peft.utils.allocator import keep_freed_memory

HELD_AFTER = """
import sys

from meta_peft.utils.allocator import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
block = bytearray(64 << 20)
assert resident() - before > 60 << 20
del block
print(resident() - before)
"""


def has_mallopt() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not has_mallopt(), reason="another C library")
def test_freed_memory_stays_with_the_process():
    assert int(run_python(HELD_AFTER, "given back")) < 8 << 20
    assert int(run_python(HELD_AFTER, "kept")) > 60 << 20
    assert int(run_python(HELD_AFTER, "kept", MALLOC_MMAP_THRESHOLD_="65536")) < 8 << 20, "somebody asked for less"


def test_another_system_or_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: 1 / 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()
