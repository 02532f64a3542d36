"""What a comparison found: a table, a plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.evaluate import Curve
from meta_peft.evaluation.intervals import interval
from meta_peft.evaluation.metrics import METRICS, Metric
from meta_peft.utils.atomic_files import write_file
from meta_peft.utils.figures import new_figure

JSON, TABLE, PLOT = "results.json", "results.md", "results.png"


@dataclass(frozen=True)
class Report:
    """Curves of several starts on the same held-out `tasks`, in the same order, and what the run was.

    `in_context` holds query loss and score by task, ``[T]`` each, if in-context examples were scored. All scores are of
    the one metric that the curves name; in rows and in JSON its name is the key of its values.
    """

    tasks: Sequence[str]
    curves: Mapping[str, Curve]
    run: Mapping[str, Any]
    in_context: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def metric(self) -> Metric:
        names = sorted({curve.metric for curve in self.curves.values()})
        if len(names) != 1:
            raise MetaPeftError(f"All curves of a report are of one metric; these are of {' and '.join(names)}.")
        return METRICS[names[0]]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each start and number of steps."""
        rows = []
        for name, curve in self.curves.items():
            for i, steps in enumerate(curve.steps):
                how = curve.how[i] if curve.how else ""
                rows.append(_row(name, steps, curve.factors[i], curve.loss[:, i], curve.score[:, i], self.metric, how))
        if self.in_context is not None:
            rows.append(_row("in-context examples", 0, None, *self.in_context, self.metric))
        return rows

    def markdown(self) -> str:
        """The table as Markdown."""
        metric = self.metric
        worst = f"worst task, {metric.unit}" if metric.unit else "worst task"
        lines = [
            f"| start | steps | query loss | worst task | {metric.head} (95 % interval) | {worst} | rate x |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [f"| {' | '.join(texts.values())} |" for texts in self.texts()]
        return "\n".join(lines)

    def texts(self) -> list[dict[str, str]]:
        """The rows as a table shows them."""
        metric, found = self.metric, []
        for row in self.rows():
            score, low, high = (metric.shown(v) for v in (row[metric.name], *row[f"{metric.name}_interval"]))
            factor = None if row["steps"] == 0 else row["rate_factor"]
            rate = "" if factor is None else f"{factor:g}"
            found.append(
                {
                    "start": row["start"],
                    "steps": str(row["steps"]),
                    "loss": f"{row['loss']:.2f}",
                    "worst_loss": f"{row['worst_loss']:.2f}",
                    "score": f"{score} ({low} to {high})",
                    "worst_score": metric.shown(row[f"worst_{metric.name}"]),
                    "rate_factor": ", ".join(filter(None, (rate, row["how"]))),
                }
            )
        return found

    def figure(self) -> Any:
        """Query loss and score against adaptation steps, one line for each start, with 95 % intervals."""
        figure = new_figure(9, 3.6, "plot")
        panels = figure.subplots(1, 2)
        metric = self.metric
        title = f"{metric.title} (fraction)" if metric.unit else metric.title
        for panel, key, label in zip(panels, ("loss", "score"), ("query loss", title), strict=True):
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
        return figure

    def plot(self, path: Path) -> None:
        """Write the figure as the ending of `path` says."""
        self.figure().savefig(path, dpi=150)

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.json``, ``results.md`` and ``results.png``."""
        metric = self.metric.name
        by_task = {n: {"loss": c.loss.tolist(), metric: c.score.tolist()} for n, c in self.curves.items()}
        if self.in_context is not None:
            loss, score = self.in_context
            by_task["in-context examples"] = {"loss": loss.tolist(), metric: score.tolist()}
        values = {
            "run": dict(self.run),
            "metric": metric,
            "rows": self.rows(),
            "tasks": list(self.tasks),
            "by_task": by_task,
        }
        return [
            write_file(folder / JSON, json.dumps(values, indent=1) + "\n"),
            write_file(folder / TABLE, self.markdown() + "\n"),
            write_file(folder / PLOT, self.plot),
        ]


def remove_report(folder: Path) -> None:
    """Remove what `Report.write` wrote into `folder`, if anything did: it is of an adapter that is replaced."""
    for name in (JSON, TABLE, PLOT):
        (folder / name).unlink(missing_ok=True)


def check_plots() -> None:
    """Raise if figures cannot be drawn, before anything is trained that they would show."""
    if find_spec("matplotlib") is None:
        raise MetaPeftError(
            "The plot of a comparison needs matplotlib: pip install 'meta-peft[demo]', or train with --compare none."
        )


def _row(
    name: str,
    steps: int,
    factor: float | None,
    loss: np.ndarray,
    score: np.ndarray,
    metric: Metric,
    how: str = "",
) -> dict[str, Any]:
    return {
        "start": name,
        "steps": steps,
        "rate_factor": factor,
        "how": how,
        "tasks": len(loss),
        "loss": float(loss.mean()),
        "loss_interval": interval(loss),
        "worst_loss": float(loss.max()),
        metric.name: float(score.mean()),
        f"{metric.name}_interval": interval(score),
        f"worst_{metric.name}": metric.worst(score),
    }
