"""One meta-gradient, meta_peft against its peers, on the same PEFT model and the same tokens.

    python benchmarks/peers.py                                             # once
    python benchmarks/meta_step.py --preset all --output meta_step.json
    python benchmarks/meta_step.py --preset so_nf4_16x2+2 --memory replay --tasks_per_forward 4
    python benchmarks/meta_step.py --preset budget
    python benchmarks/meta_step.py --quick                                 # a trial, in seconds

Presets are in `presets.py`; options for the workload change them, and the target then no longer applies. Each contender
has a process of its own and runs in turns with the others (`workers.py`); what it computes is compared with everybody
else's. `--memory` and `--tasks_per_forward` are meta_peft's own options; with several values, each combination is a
contender.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import budget
import options
import presets
import report
from comparison import Run, compare
from contenders import BY_DEFAULT, PEERS


def main() -> None:
    given = parse()
    run = Run(given.contenders, options.rounds(given), given.threads, given.malloc)
    changes = options.workload_changes(given)
    output: dict[str, Any] = {"program": "meta_step", "run": report.run_facts(given.threads), "rows": []}
    if given.resume and given.output.is_file():
        output["rows"] = json.loads(given.output.read_text(encoding="utf-8"))["rows"]
    done = {row["name"] for row in output["rows"]}
    for row in presets.rows_of(given.preset, changes, quick=given.quick):
        if row.name in done:
            continue
        print(f"{row.name}: {row.workload}", flush=True)
        found = compare(row.workload, options.settings(given.memory, given.tasks_per_forward), run)
        output["rows"].append({"name": row.name, "target": row.target, "against": row.against, **found})
        report.write_json(output, given.output)
    if presets.BUDGET.name in given.preset:
        row = presets.budget_row(changes, quick=given.quick)
        output["budget"] = budget.measured(row, run, given.memory, given.tasks_per_forward)
        report.write_json(output, given.output)
    for found in output["rows"]:
        print(f"\n{found['name']}\n\n{contenders_table(found)}")
    if output["rows"]:
        print(f"\n{ratios_table(output['rows'])}")
    if "budget" in output:
        print(f"\n{budget.table(output['budget'])}")


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__ or "")
    names = ", ".join(presets.NAMES)
    parser.add_argument("--preset", nargs="+", default=[], choices=presets.NAMES, metavar="NAME", help=names)
    parser.add_argument(
        "--contenders", nargs="*", default=BY_DEFAULT, choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument("--memory", nargs="+", type=options.memory_mode, help="what MAML keeps: modes or numbers")
    parser.add_argument("--tasks_per_forward", nargs="+", type=options.tasks_or_all, help="numbers, or all")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has already")
    options.add_workload_options(parser)
    given = parser.parse_args()
    if given.resume and given.output is None:
        parser.error("--resume needs --output")
    return given


def contenders_table(row: dict[str, Any]) -> str:
    lines: list[list[Any]] = []
    for name, outcome in row["contenders"].items():
        if "error" in outcome:
            lines.append([name, f"failed: {' '.join(outcome['error'].split())}"[:80], "", "", ""])
            continue
        low, high = min(outcome["seconds"]), max(outcome["seconds"])
        same = row["agreement"].get(f"{name} | plain") or row["agreement"].get(f"plain | {name}") or {}
        peak = report.gib(outcome["peak_bytes"])
        lines.append([name, outcome["median_seconds"], f"{low:.3g} to {high:.3g}", peak, same.get("digits")])
    return report.table(["contender", "median s", "range", "peak GiB over the model", "digits as plain"], lines)


def ratios_table(rows: list[dict[str, Any]]) -> str:
    """One line for each row and each setting of ours."""
    lines = []
    for row in rows:
        against = row["fastest_peer"] if row["against"] == presets.FASTEST else row["against"]
        for own, by_peer in row["peer_over_ours"].items():
            ratio, met = by_peer.get(against), None
            if row["target"] is not None and ratio is not None:
                met = "yes" if ratio["median"] >= row["target"] else "no"
            lines.append([row["name"], own, row["fastest_peer"], against, report.shown(ratio), row["target"], met])
    return report.table(["row", "setting", "fastest peer", "against", "times as fast", "target", "met"], lines)


if __name__ == "__main__":
    main()
