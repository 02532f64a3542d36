"""By how much a comparison's starts are ahead of something that was measured elsewhere on the same held-out episodes.

    python benchmarks/against_cells.py OTHER.json [OTHER.json ...] --cells FOLDER

`OTHER.json` is what `setfit_episodes.py` writes; or cells of another comparison that adapts nothing, such as in-context
examples, one for each seed. `FOLDER` has the report whose starts are compared. Scores are accuracies; differences are
of the same task and seed. Intervals are by bootstrap, of a score over tasks, each task's seeds averaged first, of a
difference over tasks and seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from meta_peft.evaluation.intervals import interval
from meta_peft.evaluation.metrics import METRICS
from meta_peft.protocol.cells import FOLDER, Found

SHOWN = METRICS["accuracy"].shown  # in whole %
Scores = dict[tuple[int, str], float]  # by seed and task


def main(words: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", type=Path, nargs="+", metavar="OTHER.json")
    parser.add_argument("--cells", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--starts", nargs="+", default=["meta", "plain"])
    given = parser.parse_args(words)
    other: Scores = {}
    for path in given.others:
        other |= _scores(path)
    seeds = sorted({seed for seed, _ in other})
    found: list[tuple[str, int, Scores]] = []
    for start in given.starts:
        cells = [Found.read(given.cells / FOLDER / f"seed{seed}-{start}.json") for seed in seeds]
        for column, steps in enumerate(cells[0].steps):
            own = {
                (cell.cell.seed, task): score[column]
                for cell in cells
                for task, score in zip(cell.tasks, cell.score, strict=True)
            }
            if own.keys() != other.keys():
                sys.exit(
                    f"{given.cells} has other tasks: {sorted(own.keys() ^ other.keys())[:3]} are on one side alone."
                )
            found.append((start, steps, own))
    print(f"{len(seeds)} seeds: {_percent(_by_seed(other).mean(0))}\n")
    print("| start | steps | accuracy, % | ahead by | by seed |\n| --- | ---: | ---: | ---: | ---: |")
    rows = []
    for start, steps, own in found:
        ahead = _by_seed({key: own[key] - other[key] for key in own})
        by_seed = ahead.mean(1).tolist()
        spread = f"{SHOWN(min(by_seed))} to {SHOWN(max(by_seed))}"
        print(f"| {start} | {steps} | {_percent(_by_seed(own).mean(0))} | {_percent(ahead)} | {spread} |")
        row = {"start": start, "steps": steps, "ahead": float(ahead.mean())}
        rows.append({**row, "interval": list(interval(ahead)), "by_seed": by_seed})
    return rows


def _scores(path: Path) -> Scores:
    values = json.loads(path.read_text(encoding="utf-8"))
    if "episodes" in values:
        return {(each["seed"], each["task"]): each["accuracy"] for each in values["episodes"]}
    cell = Found.read(path)
    if len(cell.steps) != 1:
        sys.exit(f"{path} has scores after {cell.steps} steps: give one that adapts nothing.")
    return {(cell.cell.seed, task): score for task, (score,) in zip(cell.tasks, cell.score, strict=True)}


def _by_seed(scores: Scores) -> np.ndarray:
    """``[N, T]`` of N seeds and T tasks, which are the same with each seed."""
    seeds, tasks = (sorted(set(of)) for of in zip(*scores, strict=True))
    return np.array([[scores[seed, task] for task in tasks] for seed in seeds])


def _percent(values: np.ndarray) -> str:
    """The mean of ``[T]`` or ``[N, T]`` with its interval."""
    mean, low, high = map(SHOWN, (float(values.mean()), *interval(values)))
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
