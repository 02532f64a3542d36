"""One run at a time in a folder: two would take each other's checkpoints for their own."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType

from meta_peft.errors import MetaPeftError

try:
    import fcntl
except ImportError:  # Windows, where nothing is claimed
    fcntl = None  # type: ignore[assignment]

PATIENCE = 10.0  # seconds; the workers of a process that was killed live on for a moment


class Claim:
    """A folder that is this run's alone from `take` on until the context ends, or the process does.

    It is the folder itself that is locked (`flock`), so nothing is left behind. A file system that has no locks claims
    nothing.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: int | None = None

    def take(self) -> None:
        """Claim the folder, which is made if it is not there.

        Raises:
            MetaPeftError: another run has it.
        """
        if fcntl is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._folder, os.O_RDONLY)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise MetaPeftError(
                        f"Another run trains in {self._folder} now, and the two would take each other's checkpoints for"
                        " their own: give each an output_dir of its own."
                    ) from None
                time.sleep(0.1)
            except OSError:
                return
            else:
                return

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # workers that were forked meanwhile hold the same lock
            os.close(self._file)
            self._file = None
