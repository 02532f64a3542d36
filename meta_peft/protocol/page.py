"""The report of a comparison: one HTML page that needs no other file, the same as Markdown, and all numbers as JSON."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from meta_peft.evaluation.intervals import interval
from meta_peft.protocol.arguments import IN_CONTEXT, TITLES
from meta_peft.protocol.summary import Summary
from meta_peft.protocol.verdict import verdict
from meta_peft.utils.atomic_files import write_file
from meta_peft.utils.words import counted

Table = tuple[str, list[str], list[list[str]]]
"""What it shows, its columns and its rows."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
table { font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
ul.verdict li:first-child { font-weight: 600; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .8rem; }
"""


def write_page(summary: Summary, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``report.svg`` and ``summary.json``."""
    svg = _svg(summary)
    texts = {
        "report.html": as_html(summary, svg),
        "report.md": as_markdown(summary),
        "report.svg": svg,
        "summary.json": json.dumps(as_values(summary), indent=1) + "\n",
    }
    return [write_file(folder / name, text) for name, text in texts.items()]


def as_markdown(summary: Summary) -> str:
    parts = ["# Comparison of starts", "\n".join(f"- {said}" for said in verdict(summary))]
    parts.append(f"![Query loss and {summary.metric.title} against adaptation steps](report.svg)")
    for title, columns, rows in tables(summary):
        lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
        parts.append("\n".join([f"## {title}", "", *lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts) + "\n"


def as_html(summary: Summary, svg: str) -> str:
    said = "".join(f"<li>{html.escape(text)}</li>" for text in verdict(summary))
    shown = "".join(_html_table(*table) for table in tables(summary))
    about = html.escape(json.dumps(summary.report.run, indent=1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison of starts</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style></head><body><h1>Comparison of starts</h1><ul class="verdict">{said}</ul>'
        f"{svg[svg.index('<svg') :]}{shown}<details><summary>What was run</summary><pre>{about}</pre></details>"
        "</body></html>\n"
    )


def as_values(summary: Summary) -> dict[str, Any]:
    """All numbers of the tables, and the differences."""
    return {
        "run": summary.report.run,
        "seeds": summary.seeds,
        "metric": summary.metric.name,
        "tasks": summary.tasks,
        "verdict": verdict(summary),
        "rows": summary.report.rows(),
        "differences": [asdict(difference) for difference in summary.differences()],
        "calibration_error": {start: summary.calibration(start) for start in summary.starts},
        "cost": {start: summary.cost(start) for start in summary.starts},
        "along_shots": _lists(summary.along_shots()),
        "along_tasks": _lists(summary.along_tasks()),
        "along_training": summary.along_training(),
    }


def tables(summary: Summary) -> Iterator[Table]:
    yield _scores(summary)
    yield _differences(summary)
    along = summary.along_shots()
    if any(len(by_shots) > 1 for by_shots in along.values()):
        of = "a task" if summary.ways is None else "each class"
        yield _along(summary, f"Examples of {of}, after {summary.at} steps", along)
    if counts := summary.along_tasks():
        yield _along(summary, f"Training tasks, after {summary.at} steps", counts)
    if training := summary.along_training():
        yield _along_training(summary, training)
    yield _cost(summary)


def _scores(summary: Summary) -> Table:
    errors = [f"{error:.2f}" for start in summary.starts for error in summary.calibration(start)]
    columns = [
        "start",
        "steps",
        "query loss",
        f"{summary.metric.head} (95 % interval)",
        "worst task",
        "calibration error",
        "rate x",
    ]
    lines = [
        [row["start"], row["steps"], row["loss"], row["score"], row["worst_score"], error, row["rate_factor"]]
        for row, error in zip(summary.report.texts(), errors, strict=True)
    ]
    parts = [f"Held-out tasks: {len(summary.tasks)}", counted(len(summary.seeds), "seed")]
    if summary.query_rows is not None:
        parts.insert(1, f"{counted(summary.query_rows, 'query row')} each")
    return ", ".join(parts), columns, lines


def _differences(summary: Summary) -> Table:
    metric, lines = summary.metric, []
    for d in summary.differences():
        mean, low, high = (metric.shown(value) for value in (d.mean, *d.interval))
        seeds = f"{metric.shown(min(d.by_seed))} to {metric.shown(max(d.by_seed))}"
        gains = ""
        if d.of_gains is not None:
            more, (least, most) = d.of_gains
            gains = f"{metric.shown(more)} ({metric.shown(least)} to {metric.shown(most)})"
        lines.append([TITLES[d.other], str(d.steps), f"{mean} ({low} to {high})", seeds, gains])
    columns = [
        "other start",
        "steps",
        "meta-learned is ahead by (95 % interval)",
        "by seed",
        "gains more from adapting",
    ]
    return f"Meta-learned LoRA against each other start, {metric.head}", columns, lines


def _along(summary: Summary, title: str, found: dict[str, dict[int, np.ndarray]]) -> Table:
    numbers = sorted({n for by_number in found.values() for n in by_number})
    lines = []
    for start, by_number in found.items():
        cells = [_with_interval(summary, by_number[n]) if n in by_number else "" for n in numbers]
        lines.append([TITLES[start], *cells])
    return f"{title}: {summary.metric.head}", ["start", *map(str, numbers)], lines


def _along_training(summary: Summary, found: dict[str, dict[float, float | None]]) -> Table:
    parts = sorted({part for by_part in found.values() for part in by_part})
    lines = []
    for start, by_part in found.items():
        losses = [by_part.get(part) for part in parts]
        lines.append([TITLES[start], *("" if loss is None else f"{loss:.3f}" for loss in losses)])
    title = f"Part of the training, query loss of the validation tasks after {summary.at} steps"
    return title, ["start", *(f"{100 * part:.0f} %" for part in parts)], lines


def _with_interval(summary: Summary, values: np.ndarray) -> str:
    mean, low, high = (summary.metric.shown(v) for v in (float(values.mean()), *interval(values)))
    return f"{mean} ({low} to {high})"


def _cost(summary: Summary) -> Table:
    columns = [
        "start",
        "outer steps",
        "training s",
        f"tokens to adapt, {summary.at} steps",
        "s to adapt",
        "prompt tokens a query",
    ]
    lines = []
    for start in summary.starts:
        cost = summary.cost(start)
        in_prompt = start == IN_CONTEXT
        seconds = "" if in_prompt else f"{cost['seconds_per_step'] * summary.at:.1f}"
        adapted = "" if in_prompt else f"{cost['support_tokens'] * summary.at:.0f}"
        prompt = f"{cost['support_tokens']:.0f}" if in_prompt else "0"
        lines.append([TITLES[start], f"{cost['outer_steps']:.0f}", f"{cost['training_seconds']:.0f}", adapted, seconds])
        lines[-1].append(prompt)
    return "Cost", columns, lines


def _html_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<h2>{html.escape(title)}</h2><table>{line(columns, 'th')}{body}</table>"


def _svg(summary: Summary) -> str:
    """The figure as text; the same numbers give the same text."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "meta_peft"}), io.StringIO() as written:
        summary.report.figure().savefig(written, format="svg", metadata={"Date": None})
        return written.getvalue()


def _lists(along: dict[str, dict[int, np.ndarray]]) -> dict[str, dict[int, list[float]]]:
    return {start: {n: values.tolist() for n, values in by_number.items()} for start, by_number in along.items()}
