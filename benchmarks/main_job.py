"""The README's comparison: the main job with ``--compare full``, over several training seeds.

    python benchmarks/main_job.py --seeds 0 1 2 --output benchmarks/results/locale_formatting

Each seed is one `accelerate launch` of the recipe in a process of its own; a seed whose results are there already is
not run again. The table averages each task over seeds first; its intervals are over tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from meta_peft.evaluate import Curve
from meta_peft.report import Report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "recipes/configs/locale_formatting.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default=CONFIG)
    options, more = parser.parse_known_args()

    results = [run(seed, options.config, options.output / f"seed_{seed}", more) for seed in options.seeds]
    report = mean_over_seeds(results)
    report.write(options.output)
    print(report.markdown())


def run(seed: int, config: str, folder: Path, more: list[str]) -> dict:
    """The results of one seed, run if they are not there."""
    if not (folder / "results.json").is_file():
        launch = [Path(sys.executable).parent / "accelerate", "launch", ROOT / "recipes/meta_lora.py"]
        options = ["--config", config, "--compare", "full", "--seed", seed, "--output_dir", folder]
        environment = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ}  # else the launcher sets one thread
        subprocess.run([str(word) for word in [*launch, *options, *more]], check=True, env=environment)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def mean_over_seeds(results: list[dict]) -> Report:
    """One report whose value for a task is the mean over seeds."""
    tasks = sorted(results[0]["tasks"])
    if any(sorted(result["tasks"]) != tasks for result in results):
        raise SystemExit("The seeds were evaluated on different tasks.")

    def mean(start: str, key: str) -> np.ndarray:
        return np.mean([aligned(result, start, key, tasks) for result in results], axis=0)

    starts = list(results[0]["by_task"])
    metric = results[0].get("metric", "exact_match")
    steps = tuple(row["steps"] for row in results[0]["rows"] if row["start"] == starts[0])
    curves = {
        start: Curve(steps, mean(start, "loss"), mean(start, metric), (None,) * len(steps), metric)
        for start in starts
        if start != "in-context examples"
    }
    in_context = None
    if "in-context examples" in starts:
        in_context = mean("in-context examples", "loss"), mean("in-context examples", metric)
    run_of = {**results[0]["run"], "seeds": [result["run"]["training"]["seed"] for result in results]}
    seconds = [result["run"]["training_seconds"] for result in results]
    return Report(tasks, curves, {**run_of, "training_seconds": seconds, "machine": platform.machine()}, in_context)


def aligned(result: dict, start: str, key: str, tasks: list[str]) -> np.ndarray:
    """Values by task in the order of `tasks`."""
    place = {task: i for i, task in enumerate(result["tasks"])}
    return np.array(result["by_task"][start][key])[[place[task] for task in tasks]]


if __name__ == "__main__":
    main()
