"""Forming the group of processes, where Accelerate would not form the one that is needed.

On CPUs Accelerate does not pass the time limit on, and a process that hangs would be noticed after half an hour. And
processes that `torchrun --max_restarts` or `accelerate launch --max_restarts` starts again after one has failed share the
launcher's key-value store with the failed attempt, whose addresses are still there; with gloo they may find those. So each
attempt gets a part of the store to itself.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def attempt() -> int | None:
    """How often the launcher has started this job again; None if it never will."""
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if may_restart else None


def join(timeout_seconds: float) -> None:
    """Form the group of the processes that a launcher started, unless Accelerate does it just as well.

    Args:
        timeout_seconds: how long a process waits for the others before it fails.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    may_restart = attempt() is not None
    if processes == 1 or dist.is_initialized() or not (on_cpu or (may_restart and torch.cuda.is_available())):
        return
    timeout = timedelta(seconds=timeout_seconds)
    where: dict[str, Any] = {}
    if may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        whole: Any = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, processes, is_master=False, timeout=timeout
        )
        store = dist.PrefixStore(f"attempt_{attempt()}", whole)  # type: ignore[attr-defined]
        where = {"store": store, "rank": int(os.environ["RANK"]), "world_size": processes}
    dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timeout, **where)
