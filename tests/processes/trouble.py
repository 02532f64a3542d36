"""A job in which something goes wrong: python trouble.py WHAT OUTPUT"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from conftest import tiny_base, with_lora
from surface import config, letter_tasks, tiny_tokenizer
from transformers import TrainerCallback

from meta_peft import MetaPeftError, MetaTrainer
from meta_peft.processes import group


class At(TrainerCallback):
    """Does something in process 1, at the end of outer step 2."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            self.do()


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_alone() -> None: ...


def break_callback() -> None:
    raise RuntimeError("a callback broke in process 1")


def main(what: str, output: Path) -> None:
    tasks = letter_tasks("abcdefgh")
    args = config(output, max_steps=6, tasks_per_step=3, save_strategy="steps", save_steps=1, ddp_timeout=15)
    do = {"freeze": freeze, "die": die, "callback": break_callback, "drift": leave_alone}.get(what, leave_alone)
    run = MetaTrainer(with_lora(tiny_base("llama")), args, tasks, processing_class=tiny_tokenizer(), callbacks=[At(do)])
    if what == "row" and args.process_index == 1:
        run.train_dataset.tasks.dataset = None  # every row that this process reads fails
    if what == "drift" and args.process_index == 1:
        original = run.optimizer_step_size = run.outer_step.total

        def drifting(**options):
            total, wrong = original(**options)
            for grad in total.gradient.grads.adapter.values():
                grad.mul_(1.5)
            return total, wrong

        run.outer_step.total = drifting
    if what == "memory" and args.process_index == 1:

        def full(*_):
            raise MemoryError("out of memory")

        run.loss_fn._measured = full
    print("started", time.time(), flush=True)
    try:
        run.train()
    except MetaPeftError as error:
        print(f"process {args.process_index}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(3)
    group.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
