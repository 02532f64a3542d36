"""A job of one or more processes: every kind of run on the same tasks, its result written by process 0.

python updates.py FOLDER makes them in 1, 2 and 4 processes, the last of which take their time, so that they make some.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from processes.forked import together
from safetensors.torch import save_file
from surface import letter_tasks, trainer
from tiny_models import tiny_base, with_lora

from meta_peft.processes import group

# 5 tasks a step: they divide evenly among one process only. Plain gradient descent outside, since Adam makes a step of
# rounding errors where a gradient is almost zero.
SHARED = {"optim": "sgd", "learning_rate": 0.1, "inner_lr_learning_rate": 0.1, "tasks_per_step": 5, "max_steps": 3}
SHARED |= {"inner_optimizer": "sgd", "inner_lr": 0.1, "inner_steps": 2, "max_grad_norm": 0.5}
RUNS = {
    "maml": {},
    "adam": {"inner_optimizer": "adam", "inner_lr": 0.01, "inner_adam_eps_root": 1e-4},
    "accumulated": {"gradient_accumulation_steps": 2},
    "replay": {"memory": "replay", "inner_lr_per_step": True},
    "one at a time": {"tasks_per_forward": 1},
    "maml++": {"multi_step_until": 2, "first_order_until": 1, "multitask_warmup_steps": 1},
    "meta-sgd": {"inner_lr_per_entry": True},
    "anil": {"fast_weights": "lora_B"},
    "fomaml": {"algorithm": "fomaml"},
    "imaml": {"algorithm": "imaml", "proximal": 5.0},
    "reptile": {"algorithm": "reptile"},
    "multitask": {"algorithm": "multitask"},
    "fewer tasks than processes": {"tasks_per_step": 1},
}
IN_ORDER = {"maml": {}, "accumulated": {"gradient_accumulation_steps": 2}, "adam": RUNS["adam"]}
# Two steps see all ten tasks, the third one is drawn by what they showed.
CHOOSING = {name: {"task_sampling": name} for name in ("by_difficulty", "by_gradient_diversity", "curriculum")}
FLOAT32, FLOAT64 = str(torch.float32), str(torch.float64)
EACH = {f"{FLOAT64} {name}": (options, torch.float64) for name, options in RUNS.items()}
EACH |= {f"{FLOAT32} {name}": (RUNS[name], torch.float32) for name in IN_ORDER}
EACH |= {
    f"in order {name}": ({**options, "deterministic_reduction": True}, torch.float32)
    for name, options in (IN_ORDER | CHOOSING).items()
}
OF_FOUR = [
    *(f"{FLOAT64} {name}" for name in ("maml", "accumulated", "fewer tasks than processes")),
    *(f"in order {name}" for name in ("maml", "by_difficulty")),
]


def job(output: Path, names: Iterable[str]) -> None:
    tasks = letter_tasks("abcdefg")
    # Rows of different lengths: what a row is padded to depends on which rows it is read with.
    tasks |= {
        f"{name} again": [{**row, "input": row["input"] + "xyz"} for row in tasks[name]] for name in list(tasks)[:3]
    }
    for name in names:
        options, dtype = EACH[name]
        run = trainer(output, model=with_lora(tiny_base("llama", dtype)), tasks=tasks, **SHARED | options)
        run.train()
        if run.is_world_process_zero():
            learned = {n: p.detach().contiguous() for n, p in run.loss_fn.weights.parameters().items()}
            losses = [line["loss"] for line in run.state.log_history if "loss" in line]
            learned |= {"log_rates": run.rates.log_rates.detach(), "losses": torch.tensor(losses, dtype=torch.float64)}
            save_file(learned, output / f"{name}.safetensors")
    group.leave()


def main(folder: Path) -> None:
    for processes, names in ((1, EACH), (2, EACH), (4, OF_FOUR)):
        output = folder / str(processes)
        output.mkdir()
        together(processes, partial(job, output, names), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
