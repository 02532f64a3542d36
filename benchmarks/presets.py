"""The rows of the tables: workloads by name, each with what meta_peft aims at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from workload import Workload

FASTEST = "fastest peer"


@dataclass(frozen=True)
class Row:
    """A workload, and by how many times meta_peft is to be faster there than `against`, if that is set."""

    name: str
    workload: Workload
    target: float | None = None
    against: str = FASTEST


ROWS = [
    Row("so_fp32_8x8+8", Workload(tasks=8, support=8, query=8), 1.5),
    Row("so_fp32_16x2+2", Workload(tasks=16, support=2, query=2), 2.5),
    Row("fo_fp32_16x2+2", Workload(tasks=16, support=2, query=2, order="first"), 2.5),
    Row("so_nf4_16x2+2", Workload(tasks=16, support=2, query=2, base="nf4"), 3.0, "plain"),
    Row("so_int8_16x2+2", Workload(tasks=16, support=2, query=2, base="int8"), 3.0, "plain"),
    Row("so_fp32_top_8x8+8", Workload(tasks=8, support=8, query=8, layers="top_third"), 2.5),
]
BUDGET = Row("budget", Workload(tasks=8, support=2, query=2, steps=10), 1.2)
SWEEP = [
    Row(
        f"so_{base}_{tasks}x2+2_{steps}steps",
        Workload(tasks=tasks, support=2, query=2, steps=steps, base=base),
    )
    for base in ("fp32", "nf4", "int8")
    for tasks in (1, 4, 16)
    for steps in (1, 3, 10)
]
NAMES = [*(row.name for row in ROWS), "all", "sweep", BUDGET.name]
"""What ``--preset`` takes: "all" is every single row, "budget" is measured in its own way (see `budget.py`)."""


def rows_of(names: list[str], changes: dict[str, Any], *, quick: bool) -> list[Row]:
    """The rows of presets with some fields of their workloads changed; without a preset, one row of the changes."""
    rows = [row for name in names for row in _named(name)] if names else [Row("custom", Workload())]
    return [_changed(row, changes, quick=quick) for row in rows]


def budget_row(changes: dict[str, Any], *, quick: bool) -> Row:
    return _changed(BUDGET, changes, quick=quick)


def _named(name: str) -> list[Row]:
    if name == BUDGET.name:
        return []
    groups = {"all": ROWS, "sweep": SWEEP} | {row.name: [row] for row in ROWS}
    return groups[name]


def _changed(row: Row, changes: dict[str, Any], *, quick: bool) -> Row:
    workload = row.workload
    if quick:  # every axis small; the row is there to be run, not to be believed
        small = {"tasks": 2, "support": 2, "query": 2, "tokens": 8, "steps": min(2, workload.steps), "shapes": "tiny"}
        workload = replace(workload, **small)
    workload = replace(workload, **changes)
    return row if workload == row.workload else replace(row, workload=workload, target=None)
