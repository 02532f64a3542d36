"""What `meta-peft inspect --estimate` says, against what a process then takes.

    python benchmarks/estimate.py --output estimate.json        # also writes estimate.md
    python benchmarks/estimate.py --quick

A random base of SmolLM2-135M's shapes. Every point is a process of its own: it loads the model, runs a forward without
gradients, and counts the most memory that it has over the loaded model in one meta-gradient. The estimate is its sum of
what is there at the fullest moment of a meta-gradient, from the same options.

Blocks of 64 kB and more are given back to the system when they are freed, so that what is measured is what is in use.
Left to itself, or with `keep_freed_memory`, glibc's heap holds freed blocks between those in use: `--malloc keep`.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import report
import torch
from workload import Workload, save_base

from meta_peft.base import load_base, lora_config, with_adapter
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.estimate.estimate import EstimateArguments, estimate, whole_rows
from meta_peft.outer_loop.memory_plan import MemoryPlan
from meta_peft.outer_loop.outer_loop import bind, meta_gradient
from meta_peft.utils.allocator import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

BASES = {"fp32": {}, "nf4": {"load_in_4bit": True}}
MODES: dict[str, dict[str, Any]] = {
    "unrolled": {"memory": "unrolled"},
    "replay": {"memory": "replay"},
    "replay, checkpointing": {"memory": "replay", "gradient_checkpointing": True},
    "finite differences": {"memory": "finite_differences"},
    "first order": {"algorithm": "fomaml"},
}
M_MMAP_MAX = -4  # from <malloc.h>
BYTES = ("estimated_bytes", "measured_bytes")
TARGET = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file; a table goes beside it")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two points, whose errors mean nothing")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--malloc", choices=["give back", "keep"], default="give back")
    parser.add_argument("--layers", type=int, default=10, help="LoRA on so many upper layers")
    parser.add_argument("--row_tokens", type=int, default=128)
    given = parser.parse_args()
    output: dict[str, Any] = {"program": "estimate", "run": report.run_facts(torch.get_num_threads()), "points": []}
    with tempfile.TemporaryDirectory() as folder:
        shapes = "tiny" if given.quick else "smollm2"
        save_base(Workload(shapes=shapes), Path(folder))
        for base, quantised in BASES.items():
            total = Workload(shapes=shapes).adapted_layers
            args = ModelArguments(folder, lora_layers=total[-given.layers :], **quantised)
            for tasks in given.tasks[:1] if given.quick else given.tasks:
                for mode in given.modes[: 1 if given.quick else None]:
                    point = {"base": base, "tasks": tasks, "mode": mode}
                    output["points"].append(
                        {**point, **compared(args, tasks, MODES[mode], given.row_tokens, given.malloc)}
                    )
                    print(output["points"][-1], flush=True)
                    report.write_json(output, given.output)
    text = table(output["points"])
    print(f"\n{text}")
    if given.output is not None:
        given.output.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")


def compared(args: ModelArguments, tasks: int, options: dict[str, Any], row_tokens: int, malloc: str) -> dict[str, Any]:
    common = {"inner_steps": 3, "tasks_per_forward": tasks, "per_device_train_batch_size": tasks, "report_to": "none"}
    config = MetaLoraConfig(use_cpu=True, shots=2, query_size=2, **common, **options)
    given = EstimateArguments(row_tokens=row_tokens)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process that nothing has happened in before
        measured = pool.apply(measured_bytes, (args, config, given, malloc))
    estimated = estimate(args, config, given).at_work
    return {"estimated_bytes": estimated, "measured_bytes": measured, "error": estimated / measured - 1}


def measured_bytes(args: ModelArguments, config: MetaLoraConfig, given: EstimateArguments, malloc: str) -> int:
    """Bytes over the loaded model, at most, in one meta-gradient of the `config`."""
    torch.set_num_threads(1)
    if malloc == "keep":
        keep_freed_memory()
    else:
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 1 << 16), (M_TRIM_THRESHOLD, 1 << 17), (M_MMAP_MAX, 1 << 20)):
            mallopt(option, value)
    torch.manual_seed(0)
    model = with_adapter(load_base(args), lora_config(args))
    algorithm, batch = config.algorithm_object(), whole_rows(config, given)
    loss_fn = bind(model, algorithm, checkpoint=config.gradient_checkpointing)
    with torch.no_grad():  # libraries are loaded and their buffers made
        loss_fn(loss_fn.weights.parameters(), whole_rows(config, replace(given, row_tokens=16)).support)
    measure.give_back()
    before = measure.resident()
    if not measure.reset_peak():
        raise RuntimeError("The system does not let a process reset its peak of memory.")
    meta_gradient(loss_fn, batch, algorithm, tasks_per_forward=MemoryPlan(config.tasks_per_forward, float("inf")))
    return measure.peak() - before


def table(points: list[dict[str, Any]]) -> str:
    lines = [
        [p["base"], p["tasks"], p["mode"], *(f"{p[n] / 1e9:.3f}" for n in BYTES), f"{100 * p['error']:+.1f}"]
        for p in points
    ]
    worst = max(abs(p["error"]) for p in points)
    columns = ["base", "tasks", "mode", "estimated GB", "measured GB", "error, %"]
    return f"{report.table(columns, lines)}\n\nLargest error: {100 * worst:.1f} %; target: {100 * TARGET:.0f} %."


if __name__ == "__main__":
    main()
