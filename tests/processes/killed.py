"""A job that is killed again and again, and goes on each time: python killed.py FOLDER.

Alone, the job runs in children of this process, which kills them at random moments. In two processes, one of them kills
itself in its first two attempts; what `torchrun` runs, here in this process, starts both again. An earlier job has left
its checkpoints in their folder.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

from processes.forked import forked
from safetensors.torch import load_file
from surface import letter_tasks, trainer
from tiny_models import tiny_base, with_lora
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import TrainerCallback

from meta_peft.processes import attempt, group

STEPS = 30
OPTIONS = {"max_steps": STEPS, "tasks_per_step": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
OPTIONS |= {"inner_optimizer": "adam", "lr_scheduler_type": "cosine", "learning_rate": 0.01, "logging_steps": 7}
OPTIONS |= {"task_sampling": "by_difficulty"}  # what it learned of the tasks has to survive too


class KillsItself(TrainerCallback):
    """Process 1 dies before the first checkpoint is written, and the next time at the end of step 9."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and (attempt(), state.global_step) in ((0, 1), (1, 9)):
            os.kill(os.getpid(), signal.SIGKILL)


def job(output: Path, *, resume: bool | None = None, callbacks=None, **options) -> int:
    """Train to the end and save; the result is how a process ends."""
    model = with_lora(tiny_base("llama"))
    run = trainer(output, model=model, tasks=letter_tasks("abcdefgh"), callbacks=callbacks, **OPTIONS | options)
    run.train(resume_from_checkpoint=resume)
    if run.interrupted is None:
        run.save_model()
    return 0 if run.interrupted is None else 128 + run.interrupted


def child(output: Path, **options) -> int:
    """Start the job in a process of its own; it resumes if there is something to resume from."""
    resume = True if any(output.glob("checkpoint-*")) else None
    return forked(partial(job, output, resume=resume, **options))


def ended(pid: int) -> int | None:
    """The exit code if it has ended; negative for a signal."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def alone(folder: Path) -> None:
    pid = child(folder / "whole")
    began = time.monotonic()
    while ended(pid) is None:
        time.sleep(0.01)
    whole = time.monotonic() - began

    rng, kills, output = random.Random(int(os.environ.get("SEED", "0"))), 0, folder / "killed"
    while True:
        pid, until = child(output), time.monotonic() + rng.uniform(0.1, 0.6) * whole
        # The first time as soon as there is something to go on from: the whole run may have had to share the machine.
        while (code := ended(pid)) is None and time.monotonic() < until:
            if kills == 0 and any(output.glob("checkpoint-*")):
                break
            time.sleep(0.001)
        if code is not None:
            assert code == 0, f"the job ended with {code}"
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    print(f"killed {kills} times")

    for number in (signal.SIGTERM, signal.SIGINT):
        output = folder / number.name
        pid = child(output)
        while not any(output.glob("checkpoint-*")):
            time.sleep(0.001)
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 128 + number, os.waitstatus_to_exitcode(status)
        assert max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")) < STEPS
        pid = child(output, save_steps=7)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def in_two_processes(folder: Path) -> None:
    job(folder / "restarted", callbacks=[KillsItself()])
    job(folder / "uninterrupted")
    # The first half by one process is resumed by this many.
    job(folder / "whole_of_one", resume=str(folder / "half_of_one" / "checkpoint-15"))
    group.leave()


def main(folder: Path) -> None:
    alone(folder)
    pid = forked(partial(job, folder / "half_of_one", max_steps=STEPS, save_total_limit=None))
    assert os.waitpid(pid, 0)[1] == 0
    assert load_file(folder / "half_of_one" / "adapter_model.safetensors")
    pid = forked(partial(job, folder / "restarted", seed=9))
    assert os.waitpid(pid, 0)[1] == 0
    standalone = {
        "min_nodes": 1,
        "max_nodes": 1,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "run_id": "one",
    }
    config = LaunchConfig(**standalone, nproc_per_node=2, max_restarts=2, start_method="fork")
    elastic_launch(config, in_two_processes)(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
