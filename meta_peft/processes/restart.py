"""Processes that `torchrun --max_restarts` or `accelerate launch --max_restarts` started again after one had failed.

All attempts share the launcher's key-value store, in which the addresses of a failed attempt are still there; with gloo
the processes of the next one may find those. So each attempt gets a part of the store to itself.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def restarts() -> int:
    """How often the launcher has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join_again(timeout_seconds: float) -> None:
    """Form the group of processes, where a launcher may restart them. Otherwise Accelerate does it."""
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if not may_restart or dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    processes, timeout = int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, processes, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=dist.PrefixStore(f"attempt_{restarts()}", store),  # type: ignore[attr-defined]
        rank=int(os.environ["RANK"]),
        world_size=processes,
        timeout=timeout,
    )
