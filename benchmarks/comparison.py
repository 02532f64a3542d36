"""Contenders side by side on one workload: time, memory, and whether they compute the same.

Run as a program, this is the process of one contender (see `workers.py`).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import report
import torch
import workers
from agreement import agreement
from contenders import CONTENDERS, Step
from options import Settings
from safetensors.torch import load_file
from workload import Workload, keywords, load_model, random_batch, save_base

PROGRAM = Path(__file__).resolve()


@dataclass(frozen=True)
class Run:
    """How contenders are run: which peers, how many rounds, and what each process is set to."""

    peers: list[str]
    rounds: int
    threads: int
    malloc: str = "keep"


def compare(workload: Workload, own: dict[str, Settings], run: Run) -> dict[str, Any]:
    """Everybody's seconds, peak memory and gradient; ratios of times within a round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        specs = specs_of(workload, own, run, folder)
        outcomes = workers.take_turns(PROGRAM, specs, run.rounds, results=folder)
        gradients = {
            name: load_file(workers.result_file(folder, i))
            for i, name in enumerate(specs)
            if "error" not in outcomes[name]
        }
    ran = {name: outcome for name, outcome in outcomes.items() if "error" not in outcome}
    for outcome in ran.values():
        outcome["median_seconds"] = statistics.median(outcome["seconds"])
    peers_ran = [name for name in ran if name not in own]
    return {
        "workload": workload.to_dict(),
        "contenders": outcomes,
        "agreement": {f"{a} | {b}": agreement(gradients[a], gradients[b]) for a, b in combinations(gradients, 2)},
        "fastest_peer": min(peers_ran, key=lambda name: ran[name]["median_seconds"], default=None),
        "peer_over_ours": {name: {p: _paired(ran[p], ran[name]) for p in peers_ran} for name in own if name in ran},
    }


def each_alone(workload: Workload, own: dict[str, Settings], run: Run) -> dict[str, dict[str, Any]]:
    """The same contenders with no other process beside them, and without looking at their gradients."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, spec in specs_of(workload, own, run, Path(temporary)).items():
            outcomes |= workers.take_turns(PROGRAM, {name: spec}, run.rounds)
    return outcomes


def specs_of(workload: Workload, own: dict[str, Settings], run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    """What each process is told; `folder` gets the base model if it has to be quantised."""
    base_folder = None
    if workload.base != "fp32":
        base_folder = str(folder / "base")
        save_base(workload, folder / "base")
    shared = {"workload": workload.to_dict(), "folder": base_folder, "threads": run.threads, "malloc": run.malloc}
    specs = {name: {"contender": "ours", "options": settings, **shared} for name, settings in own.items()}
    return specs | {name: {"contender": name, "options": {}, **shared} for name in run.peers}


def load(spec: dict[str, Any]) -> Callable[[], Step]:
    """In a contender's process: the model, one plain forward without gradients, and what makes the contender."""
    workload = Workload(**spec["workload"])
    model = load_model(workload, Path(spec["folder"]) if spec["folder"] else None)
    batch = random_batch(workload)
    with torch.no_grad():
        model(**keywords(batch.support.tasks(0, 1)))
    return lambda: CONTENDERS[spec["contender"]](model, batch, workload, **spec["options"])


def _paired(peer: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return report.spread([p / o for p, o in zip(peer["seconds"], ours["seconds"], strict=True)])


if __name__ == "__main__":
    workers.serve(load)
