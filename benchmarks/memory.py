"""Peak memory of one meta-gradient over the loaded model: against inner steps, and against tasks.

    python benchmarks/peers.py                                             # once
    python benchmarks/memory.py --output memory.json                       # also writes memory.png
    python benchmarks/memory.py --quick

Every point is a process of its own, as in `meta_step.py`: it loads the model, runs a plain forward without gradients,
and counts the most memory it had at once from then on, in a first meta-gradient and `--rounds` further ones (by default
none).

Also counted: the bytes of dequantised weights that a second-order meta-gradient on 4-bit and 8-bit bases keeps, of
meta_peft and of bitsandbytes' own layers (`saved_weights.py`).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import options
import report
import workers
from comparison import PROGRAM, Run, specs_of
from contenders import BY_DEFAULT, PEERS
from saved_weights import saved_weight_bytes
from workload import Workload

MODES: list[str | int | None] = ["unrolled", "replay", 2, "finite_differences"]
STEPS = [1, 2, 4, 8, 16]
TASKS = [1, 2, 4, 8, 16]
PER_FORWARD: list[int | None] = [1, 4, None]
PEER_STEPS = 10
FLAT_TARGET, PEER_TARGET = 1.1, 4.0


def main() -> None:
    given = parse()
    run = Run(given.contenders, 0 if given.rounds is None else given.rounds, given.threads, given.malloc)
    small = {"shapes": "tiny", "tokens": 8} if given.quick else {}
    base = replace(Workload(tasks=2, support=2, query=2), **small, **options.workload_changes(given))
    steps, tasks, peer_steps = ([1, 2], [2], 2) if given.quick else (STEPS, TASKS, PEER_STEPS)
    output: dict[str, Any] = {"program": "memory", "run": report.run_facts(given.threads), "workload": base.to_dict()}
    output |= {"peer_steps": peer_steps, "points": []}

    def add(sweep: str, workload: Workload, own: dict[str, options.Settings], peers: list[str]) -> None:
        for point in points(sweep, workload, own, replace(run, peers=peers)):
            output["points"].append(point)
            report.write_json(output, given.output)

    for n in sorted({*steps, peer_steps}):
        own = options.settings(given.memory or MODES, [1])
        add("steps", replace(base, steps=n), own, run.peers if n == peer_steps else [])
    for n in tasks:
        own = options.settings([given.sweep_memory], given.tasks_per_forward or PER_FORWARD)
        add("tasks", replace(base, tasks=n), own, [])
    output["ratios"] = ratios(output["points"], steps, peer_steps)
    output["saved_weights"] = {kind: saved(replace(base, base=kind)) for kind in ("nf4", "int8")}
    report.write_json(output, given.output)
    print(f"\n{tables(output)}")
    if given.output is not None:
        plot(output, given.output.with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__ or "")
    parser.add_argument("--contenders", nargs="*", default=BY_DEFAULT, choices=PEERS, metavar="PEER")
    parser.add_argument("--memory", nargs="+", type=options.memory_mode, help=f"modes against steps, {MODES}")
    parser.add_argument(
        "--sweep_memory", type=options.memory_mode, help="the mode against tasks; the library's default"
    )
    parser.add_argument("--tasks_per_forward", nargs="+", type=options.tasks_or_all, help="against tasks; 1 4 all")
    options.add_workload_options(parser)
    parser.set_defaults(rounds=None)
    return parser.parse_args()


def points(sweep: str, workload: Workload, own: dict[str, options.Settings], run: Run) -> list[dict[str, Any]]:
    """One process for each contender, one after the other."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in specs_of(workload, own, run, Path(folder)).items():
            outcome = workers.take_turns(PROGRAM, {name: spec}, run.rounds, say=lambda _: None)[name]
            point = {"sweep": sweep, "contender": name, "settings": spec["options"], "steps": workload.steps}
            point |= {"tasks": workload.tasks, **outcome}
            print(f"    {workload.steps} steps, {workload.tasks} tasks, {name}: {_peak_or_error(point)}", flush=True)
            found.append(point)
    return found


def ratios(points: list[dict[str, Any]], steps: list[int], peer_steps: int) -> dict[str, Any]:
    """How flat each mode is in the steps, and how much less it takes than the most frugal peer."""
    measured = [point for point in points if point["sweep"] == "steps" and "error" not in point]
    peak = {(point["contender"], point["steps"]): point["peak_bytes"] for point in measured}
    peers = {name: peak[name, n] for name, n in peak if name in PEERS}
    own = sorted({name for name, _ in peak if name not in PEERS})
    low, high = steps[0], steps[-1]
    flat = {name: peak[name, high] / peak[name, low] for name in own if {(name, high), (name, low)} <= set(peak)}
    best = min(peers, key=lambda name: peers[name], default=None)
    less = {
        name: peers[best] / peak[name, peer_steps] for name in own if best is not None and (name, peer_steps) in peak
    }
    return {
        "most_steps_over_fewest": flat,
        "most_frugal_peer": best,
        "peer_over_ours": less,
        "targets": {"most_steps_over_fewest, replay": FLAT_TARGET, "peer_over_ours": PEER_TARGET},
    }


def saved(workload: Workload) -> dict[str, Any]:
    """What meta_peft keeps of the weights of a quantised base, and what plain autograd through bitsandbytes keeps."""
    return {name: saved_weight_bytes(workload, name) for name in ("ours", "plain")}


def tables(output: dict[str, Any]) -> str:
    lines = [
        [p["sweep"], p["steps"], p["tasks"], p["contender"], _peak_or_error(p), p.get("warm_up_seconds")]
        for p in output["points"]
    ]
    text = report.table(["against", "steps", "tasks", "contender", "peak GiB over the model", "first run s"], lines)
    found = output["ratios"]
    lines = [
        [name, ratio, found["peer_over_ours"].get(name)] for name, ratio in found["most_steps_over_fewest"].items()
    ]
    best = f"{found['most_frugal_peer']} / ours at {output['peer_steps']} steps (target {PEER_TARGET:g})"
    flat = f"most steps / fewest (target for replay {FLAT_TARGET:g})"
    text += "\n\n" + report.table(["setting", flat, best], lines)
    lines = [
        [kind, name, report.gib(counted["weight_bytes"]), report.gib(counted["all_bytes"])]
        for kind, by_name in output["saved_weights"].items()
        for name, counted in by_name.items()
    ]
    columns = ["base", "contender", "dequantised weights saved, GiB (target for ours 0)", "all that was saved, GiB"]
    return text + "\n\n" + report.table(columns, lines)


def plot(output: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=False)
    for axis, sweep in zip(axes, ("steps", "tasks"), strict=True):
        measured = [point for point in output["points"] if point["sweep"] == sweep and "error" not in point]
        for name in dict.fromkeys(point["contender"] for point in measured):
            mine = [point for point in measured if point["contender"] == name]
            values = [[point[sweep] for point in mine], [point["peak_bytes"] / (1 << 30) for point in mine]]
            axis.plot(*values, marker="x" if name in PEERS else "o", label=name)
        axis.set_xlabel({"steps": "inner steps", "tasks": "tasks"}[sweep])
        axis.set_ylabel("peak memory over the model, GiB")
        axis.set_ylim(0, 1.1 * max((point["peak_bytes"] / (1 << 30) for point in measured), default=1.0))
        axis.legend(fontsize="small")
    figure.tight_layout()
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    plt.close(figure)


def _peak_or_error(point: dict[str, Any]) -> str:
    return f"failed: {' '.join(point['error'].split())}"[:60] if "error" in point else report.gib(point["peak_bytes"])


if __name__ == "__main__":
    main()
