"""Tasks per second in one process and in two, each with one thread, and what goes into an outer step.

    python benchmarks/scaling.py --output benchmarks/results/scaling/scaling.json

The same outer steps (`tasks` tasks each, spread over the processes) are made by 1 process and by 2, in turns, each time
by processes of their own that talk over gloo. An outer step is timed in parts: the meta-gradients of the process's own
tasks, waiting for the others, the reduction of the sum, and the optimizer; a checkpoint is timed on its own. Efficiency
is the time of one process over that of two, halved: 1 if two processes do twice as much, 0.85 is aimed at. It needs two
cores that nothing else uses.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import options
import report
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from workload import Workload, load_model, random_batch

from meta_peft import MAML, SGD, AdapterLoss, InnerRule, LearnedRates, StepSum, assign_gradient, meta_gradient
from meta_peft.processes import group, join
from meta_peft.survival import checkpoints, training_state
from meta_peft.utils.allocator import keep_freed_memory

PROGRAM = Path(__file__).resolve()
PROCESSES, TARGET, STEPS = (1, 2), 0.85, 2
PARTS = ("own tasks", "waiting", "reduction", "optimizer", "checkpoint")


def main() -> None:
    if "--worker" in sys.argv:
        worker(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
        return
    parser = options.parser_of(__doc__ or "")
    options.add_workload_options(parser)
    given = parser.parse_args()
    workload = Workload(**({"tasks": 8, "support": 2, "query": 2} | options.workload_changes(given)))
    if given.quick:
        workload = Workload(shapes="tiny", tasks=4, support=2, query=2, tokens=8, steps=1)
    times: dict[int, list[dict[str, float]]] = {processes: [] for processes in PROCESSES}
    for number in range(1, (1 if given.quick else given.rounds or 3) + 1):
        for processes in PROCESSES:
            found = run(processes, workload)
            times[processes].append(found)
            print(f"    round {number}, {processes} processes: {found['step']:.3g} s a step", flush=True)
    output = {"program": "scaling", "run": report.run_facts(1), "workload": workload.to_dict()} | summary(
        times, workload
    )
    report.write_json(output, given.output)
    print(f"\n{table(output)}")


def run(processes: int, workload: Workload) -> dict[str, float]:
    """One job; the seconds of process 0, medians over its steps."""
    with tempfile.TemporaryDirectory() as folder:
        told = json.dumps({"workload": workload.to_dict(), "output": str(Path(folder) / "times.json")})
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        own = {"PYTHONPATH": str(report.ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*words, str(PROGRAM), "--worker", told],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found: dict[str, float] = json.loads((Path(folder) / "times.json").read_text())
    return found


def summary(times: dict[int, list[dict[str, float]]], workload: Workload) -> dict[str, Any]:
    efficiency = [one["step"] / two["step"] / 2 for one, two in zip(times[1], times[2], strict=True)]
    seconds = {
        processes: {part: statistics.median(found[part] for found in rounds) for part in (*PARTS, "step")}
        for processes, rounds in times.items()
    }
    return {
        "rounds": times,
        "median_seconds": seconds,
        "tasks_per_second": {processes: workload.tasks / found["step"] for processes, found in seconds.items()},
        "efficiency": report.spread(efficiency),
        "target": TARGET,
    }


def table(output: dict[str, Any]) -> str:
    lines = [
        [processes, output["tasks_per_second"][processes], found["step"], *(found[part] for part in PARTS)]
        for processes, found in output["median_seconds"].items()
    ]
    columns = ["processes", "tasks per second", "step s", *(f"{part} s" for part in PARTS)]
    return f"{report.table(columns, lines)}\n\nefficiency {report.shown(output['efficiency'])}, aimed at {TARGET}"


# ---- in a process of the job


def worker(told: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    join(600)
    workload = Workload(**told["workload"])
    model, batch = load_model(workload, None), random_batch(workload)
    keep_freed_memory()
    rule = InnerRule(SGD(), lr=workload.lr, steps=workload.steps, learn_rates=True)
    loss_fn, algorithm = AdapterLoss(model), MAML(rule)
    weights = loss_fn.weights.parameters()
    rates = LearnedRates(rule, weights)
    optimizer = torch.optim.AdamW([*weights.values(), rates.log_rates], lr=1e-5, weight_decay=0.0)
    first, last = (n * workload.tasks // group.count() for n in (group.rank(), group.rank() + 1))
    mine, step_sum = batch.part(first, last), StepSum(weights, rates.values())
    laps: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}

    def lap(part: str, since: float) -> float:
        now = time.perf_counter()
        laps[part].append(now - since)
        return now

    for _ in range(STEPS + 1):  # the first one warms up
        _together()
        began = time.perf_counter()
        step_sum.add(meta_gradient(loss_fn, mine.to("cpu"), algorithm, rates, tasks_per_forward=4), first)
        at = lap("own tasks", began)
        _together()
        at = lap("waiting", at)
        total = step_sum.total()
        at = lap("reduction", at)
        assign_gradient(total.gradient, loss_fn, rates)
        optimizer.step()
        lap("optimizer", at)
        lap("step", began)
        at = time.perf_counter()
        if group.rank() == 0:
            checkpoint(Path(told["output"]).parent / "checkpoint-1", weights, optimizer)
        lap("checkpoint", at)
    if group.rank() == 0:
        medians = {part: statistics.median(values[1:]) for part, values in laps.items()}
        Path(told["output"]).write_text(json.dumps(medians))
    group.leave()


def checkpoint(folder: Path, weights: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """What is large in a checkpoint: the adapter and the optimizer's state, with checksums and on the disk."""

    def fill(partial: Path) -> None:
        save_file({name: w.detach().contiguous() for name, w in weights.items()}, partial / "adapter_model.safetensors")
        training_state.save(partial, {"optimizer": optimizer.state_dict()})

    checkpoints.write(folder, fill)


def _together() -> None:
    if group.count() > 1:
        dist.barrier()


if __name__ == "__main__":
    main()
