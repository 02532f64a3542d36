"""What a line of the training log says beside the Trainer's own numbers, gathered since the line before."""

from __future__ import annotations

import time

import numpy as np
from torch import Tensor

from meta_peft.training.data_wait import DataWait
from meta_peft.training.tracking import peak_memory_gb


class RunLog:
    """Counts what happens in outer steps."""

    def __init__(self) -> None:
        self.data_wait = DataWait()
        self.rate_grad_norm: Tensor | None = None
        """Of the last outer step, before it was clipped."""
        self._diverged = 0
        self._began, self._tasks = time.monotonic(), 0

    def count(self, tasks: int, diverged: int = 0) -> None:
        """So many tasks were computed, of which so many have an inner loop that goes uphill."""
        self._tasks += tasks
        self._diverged += diverged

    def line(self, losses_before: list[float]) -> dict[str, float]:
        """Tasks per second, the mean loss of support rows before the first inner step, how large the gradient of the rates
        was, and the most memory so far. Counting begins anew."""
        now = time.monotonic()
        found = {
            "diverged_tasks": self._diverged,
            "tasks_per_second": round(self._tasks / max(now - self._began, 1e-9), 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "data_wait_share": round(self.data_wait.share(), 4),
        }
        if losses_before:
            found["loss_before"] = float(np.mean(losses_before))
        if self.rate_grad_norm is not None:
            found["rate_grad_norm"] = float(self.rate_grad_norm)
        self._diverged, self._began, self._tasks = 0, now, 0
        return found
