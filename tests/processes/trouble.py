"""Jobs of two processes in which something goes wrong in process 1: python trouble.py FOLDER prints how each process ends.

There is no launcher that would end one process when the other fails: each has to notice by itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from processes.forked import free_port, start
from surface import config, letter_tasks, tiny_tokenizer
from tiny_models import tiny_base, with_lora
from transformers import TrainerCallback

from meta_peft import MetaPeftError, MetaTrainer
from meta_peft.processes import group

TIMEOUT = 5  # seconds that a process waits for the others


class AtStep2(TrainerCallback):
    """Does something in process 1 at the end of outer step 2."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            self.do()


def unreadable(run: MetaTrainer) -> None:
    run.train_dataset.tasks.dataset = None


def out_of_memory(run: MetaTrainer) -> None:
    def full(*_):
        raise MemoryError("out of memory")

    run.loss_fn._measured = full


def frozen(run: MetaTrainer) -> None:
    run.add_callback(AtStep2(lambda: os.kill(os.getpid(), signal.SIGSTOP)))


def dead(run: MetaTrainer) -> None:
    run.add_callback(AtStep2(lambda: os.kill(os.getpid(), signal.SIGKILL)))


def callback(run: MetaTrainer) -> None:
    def breaks():
        raise RuntimeError("a callback broke")

    run.add_callback(AtStep2(breaks))


@torch.no_grad()
def drifting(run: MetaTrainer) -> None:
    run.add_callback(AtStep2(lambda: next(iter(run.loss_fn.weights.parameters().values())).data.add_(1e-3)))


def alone_not_finite(run: MetaTrainer) -> None:
    """In this process alone every loss is no number; both have to skip the update, and stop in the end."""
    original = run.loss_fn._measured

    def measured(measure, adapter, rows):
        return [loss * float("nan") for loss in original(measure, adapter, rows)]

    run.loss_fn._measured = measured


def asked_to_stop(run: MetaTrainer) -> None:
    run.add_callback(AtStep2(lambda: os.kill(os.getpid(), signal.SIGTERM)))


TROUBLES = [unreadable, out_of_memory, frozen, dead, callback, drifting, alone_not_finite, asked_to_stop]


def job(trouble, output: Path) -> int:
    options = {"max_steps": 6, "tasks_per_step": 3, "save_strategy": "steps", "save_steps": 1}
    args = config(output, ddp_timeout=TIMEOUT, max_skipped_updates=2, **options)
    run = MetaTrainer(with_lora(tiny_base("llama")), args, letter_tasks("abcdefgh"), processing_class=tiny_tokenizer())
    if args.process_index == 1:
        trouble(run)
    try:
        run.train()
    except MetaPeftError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    group.leave()
    return 0 if run.interrupted is None else 128 + run.interrupted


def main(folder: Path) -> None:
    found = {}
    for trouble in TROUBLES:
        files = [folder / f"{trouble.__name__}{rank}.txt" for rank in (0, 1)]
        port, work = free_port(), partial(job, trouble, folder / trouble.__name__)
        began, codes = time.monotonic(), {}
        pids = [start(rank, 2, port, work, files[rank]) for rank in (0, 1)]
        while len(codes) < 2 and time.monotonic() < began + 60:
            for rank, pid in enumerate(pids):
                if rank not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(status[1])
            if codes.keys() == {0} and trouble is frozen:
                break
            time.sleep(0.02)
        seconds = time.monotonic() - began
        for rank in {0, 1} - codes.keys():
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
        said = [file.read_text() for file in files]
        steps = sorted(int(path.name.split("-")[1]) for path in (folder / trouble.__name__).glob("checkpoint-*"))
        found[trouble.__name__] = {"codes": codes, "seconds": seconds, "said": said, "checkpoints": steps}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
