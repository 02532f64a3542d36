"""How long a loop waits for its data: the share of its time that is spent with nothing to compute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class DataWait:
    """A stopwatch that runs while data is waited for."""

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as waiting."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def share(self) -> float:
        """The share of the time since this was last asked, from 0 to 1."""
        now = time.perf_counter()
        share = self._waited / max(now - self._began, 1e-9)
        self._began, self._waited = now, 0.0
        return share
