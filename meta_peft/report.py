"""What a comparison found: a table, a plot and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.evaluate import Curve, interval


@dataclass(frozen=True)
class Report:
    """Curves of several starts on the same held-out `tasks`, in the same order, and what the run was.

    `in_context` holds query loss and exact match by task, ``[T]`` each, if in-context examples were scored.
    """

    tasks: Sequence[str]
    curves: Mapping[str, Curve]
    run: Mapping[str, Any]
    in_context: tuple[np.ndarray, np.ndarray] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One row for each start and number of steps."""
        rows = []
        for name, curve in self.curves.items():
            for i, steps in enumerate(curve.steps):
                rows.append(_row(name, steps, curve.factors[i], curve.loss[:, i], curve.exact_match[:, i]))
        if self.in_context is not None:
            rows.append(_row("in-context examples", 0, None, *self.in_context))
        return rows

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [
            "| start | steps | query loss | worst task | exact match, % (95 % interval) | worst task, % | rate x |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in self.rows():
            low, high = r["exact_match_interval"]
            factor = "" if r["rate_factor"] is None or r["steps"] == 0 else f"{r['rate_factor']:g}"
            lines.append(
                f"| {r['start']} | {r['steps']} | {r['loss']:.2f} | {r['worst_loss']:.2f} | {100 * r['exact_match']:.0f}"
                f" ({100 * low:.0f} to {100 * high:.0f}) | {100 * r['worst_exact_match']:.0f} | {factor} |"
            )
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Query loss and exact match against adaptation steps, one line for each start, with 95 % intervals."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MetaPeftError("The plot needs matplotlib: pip install 'meta-peft[demo]'.") from error
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, key, label in zip(
            panels, ("loss", "exact_match"), ("query loss", "exact match (share of answers)"), strict=True
        ):
            for name, curve in self.curves.items():
                values = getattr(curve, key)
                bounds = np.array([interval(values[:, i]) for i in range(values.shape[1])])
                places = np.arange(len(curve.steps))
                (line,) = panel.plot(places, values.mean(0), marker="o", label=name)
                panel.fill_between(places, bounds[:, 0], bounds[:, 1], color=line.get_color(), alpha=0.15)
                panel.set_xticks(places, [str(s) for s in curve.steps])
            if self.in_context is not None:
                mean = self.in_context[0 if key == "loss" else 1].mean()
                panel.axhline(mean, color="grey", linestyle="--", label="in-context examples")
            panel.set(xlabel="adaptation steps", ylabel=label)
            panel.grid(alpha=0.3)
        panels[1].legend(fontsize=8)
        figure.savefig(path, dpi=150)

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.json``, ``results.md`` and ``results.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        by_task = {n: {"loss": c.loss.tolist(), "exact_match": c.exact_match.tolist()} for n, c in self.curves.items()}
        if self.in_context is not None:
            by_task["in-context examples"] = dict(
                zip(("loss", "exact_match"), (values.tolist() for values in self.in_context), strict=True)
            )
        values = {"run": dict(self.run), "rows": self.rows(), "tasks": list(self.tasks), "by_task": by_task}
        made = {
            "results.json": lambda path: path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8"),
            "results.md": lambda path: path.write_text(self.markdown() + "\n", encoding="utf-8"),
            "results.png": self.plot,
        }
        for name, write in made.items():
            partial = folder / f"writing-{name}"  # the ending says the format
            write(partial)
            os.replace(partial, folder / name)
        return [folder / name for name in made]


def _row(name: str, steps: int, factor: float | None, loss: np.ndarray, match: np.ndarray) -> dict[str, Any]:
    return {
        "start": name,
        "steps": steps,
        "rate_factor": factor,
        "tasks": len(loss),
        "loss": float(loss.mean()),
        "loss_interval": interval(loss),
        "worst_loss": float(loss.max()),
        "exact_match": float(match.mean()),
        "exact_match_interval": interval(match),
        "worst_exact_match": float(match.min()),
    }
