"""Several processes of one job, forked from a process that has imported everything, which alone takes ten seconds."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked(job: Callable[[], int | None]) -> int:
    """The id of a process that runs `job`, to exit with what that returns, or with 1 if it raises."""
    gc.freeze()  # what was imported stays: to look through all of it costs each process half a second a training
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = job() or 0
        except BaseException:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def start(rank: int, processes: int, port: int, job: Callable[[], int | None], said: Path) -> int:
    """The id of process `rank` of so many, told so as `torchrun` tells it; what it prints goes to the file `said`."""

    def one_of_them() -> int | None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        file = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        return job()

    return forked(one_of_them)


def together(processes: int, job: Callable[[], int | None], folder: Path) -> None:
    """Run `job` in so many processes to its end; the first that fails ends all of them, and this one with its words."""
    port = free_port()
    said = [folder / f"said_by_{rank}_of_{processes}.txt" for rank in range(processes)]
    pids = {start(rank, processes, port, job, said[rank]): rank for rank in range(processes)}
    while pids:
        pid, status = os.wait()
        rank = pids.pop(pid)
        if os.waitstatus_to_exitcode(status):
            for other in pids:
                os.kill(other, 9)
                os.waitpid(other, 0)
            sys.exit(f"process {rank} of {processes} failed:\n{said[rank].read_text()}")
