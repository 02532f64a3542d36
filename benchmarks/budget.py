"""How fast meta_peft is within the memory that the fastest peer takes.

1. Each peer runs alone: the fastest one's peak memory is the budget.
2. Each of meta_peft's settings runs alone: the fastest one that stays within the budget is chosen.
3. The two run in turns, and their times are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import options
import presets
import report
from comparison import Run, compare, each_alone

MODES: list[str | int | None] = ["unrolled", "replay", 2, 5]
"""Those that are exact; the numbers are how many of the last steps keep their graphs."""


def measured(
    row: presets.Row,
    run: Run,
    memory: list[str | int | None] | None = None,
    tasks_per_forward: list[int | None] | None = None,
) -> dict[str, Any]:
    own = options.settings(memory or MODES, tasks_per_forward or _divisors(row.workload.tasks))
    print(f"{row.name}, each alone: {row.workload}", flush=True)
    alone = each_alone(row.workload, own, replace(run, rounds=1))
    found: dict[str, Any] = {"name": row.name, "target": row.target, "workload": row.workload.to_dict(), "alone": alone}
    ran = {name: outcome for name, outcome in alone.items() if "error" not in outcome}
    peers = [name for name in ran if name not in own]
    if not peers:
        return found | {"problem": "No peer ran."}
    fastest = min(peers, key=lambda name: ran[name]["seconds"][0])
    found |= {"fastest_peer": fastest, "budget_bytes": ran[fastest]["peak_bytes"]}
    within = [name for name in ran if name in own and ran[name]["peak_bytes"] <= found["budget_bytes"]]
    if not within:
        return found | {"problem": "None of our settings stays within the budget."}
    chosen = min(within, key=lambda name: ran[name]["seconds"][0])
    print(f"{row.name}, in turns", flush=True)
    compared = compare(row.workload, {chosen: own[chosen]}, replace(run, peers=[fastest]))
    return found | {"chosen": chosen, "compared": compared}


def table(found: dict[str, Any]) -> str:
    lines = [
        [name, f"failed: {outcome['error']}"[:60] if "error" in outcome else outcome["seconds"][0], _peak(outcome)]
        for name, outcome in found["alone"].items()
    ]
    text = f"{found['name']}\n\n" + report.table(["contender, alone", "s", "peak GiB over the model"], lines)
    if "problem" in found:
        return f"{text}\n\n{found['problem']}"
    ratio = found["compared"]["peer_over_ours"].get(found["chosen"], {}).get(found["fastest_peer"])
    line = [
        report.gib(found["budget_bytes"]),
        found["chosen"],
        found["fastest_peer"],
        report.shown(ratio),
        found["target"],
    ]
    return f"{text}\n\n" + report.table(
        ["budget GiB", "fastest within it", "against", "times as fast", "target"], [line]
    )


def _peak(outcome: dict[str, Any]) -> str:
    return report.gib(outcome.get("peak_bytes"))


def _divisors(n_tasks: int) -> list[int | None]:
    return [n for n in range(1, n_tasks + 1) if n_tasks % n == 0]
