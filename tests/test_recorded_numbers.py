"""The numbers of the README are those of the recorded runs, so that a run that is measured again shows in both."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from surface import ROOT

from meta_peft.evaluate import interval

EVIDENCE = ROOT / "benchmarks" / "results" / "evidence"
DECODER = EVIDENCE / "decoder_classification"
ENCODER = EVIDENCE / "encoder_classification"
FAMILIES = ("definitions", "topics", "sentiment")  # in the order of the README's columns
README = (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def percent(value: float) -> str:
    return f"{100 * value:.0f}".replace("-0", "0")


def score(folder: Path, start: str, steps: int) -> dict[str, Any]:
    found = summary(folder)
    (row,) = (row for row in found["rows"] if (row["start"], row["steps"]) == (start, steps))
    return {"mean": row[found["metric"]], "interval": row[f"{found['metric']}_interval"], "loss": row["loss"]}


def with_interval(mean: float, interval: list[float]) -> str:
    return f"{percent(mean)} ({percent(interval[0])} to {percent(interval[1])})"


def rows_of(first: str) -> list[list[str]]:
    """The other cells of the README's table rows that begin with `first`."""
    rows = [line for line in README.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip().strip("*") for cell in row.strip("|").split("|")[1:]] for row in rows]


@pytest.mark.parametrize(
    ("row", "start"),
    [("multi-task LoRA, adapted too", "multi-task LoRA"), ("**meta-learned LoRA**", "meta-learned LoRA")],
)
def test_classes_under_a_head(row: str, start: str):
    found = [score(DECODER / "head_from_zero" / family, start, 10) for family in FAMILIES]
    expected = [with_interval(each["mean"], each["interval"]) for each in found]
    assert expected in [of_row for of_row in rows_of(row) if len(of_row) == len(expected)]


def test_examples_in_the_prompt():
    """Each task's mean over the seeds, then over the tasks."""
    expected = []
    for family in FAMILIES:
        by_task: dict[str, list[float]] = {}
        for file in sorted((DECODER / "in_context" / f"{family}_named").rglob("*in_context.json")):
            cell = json.loads(file.read_text(encoding="utf-8"))
            for task, (score_of_task,) in zip(cell["tasks"], cell["score"], strict=True):
                by_task.setdefault(task, []).append(score_of_task)
        assert {len(values) for values in by_task.values()} == {5}, "five seeds"
        means = np.array([np.mean(by_task[task]) for task in sorted(by_task)])
        expected.append(with_interval(float(means.mean()), list(interval(means))))
    assert rows_of("eight examples in the prompt, classes named") == [expected]


@pytest.mark.parametrize(("row", "other"), [("plain LoRA", "plain"), ("multi-task LoRA", "multitask")])
def test_by_how_much_it_is_ahead(row: str, other: str):
    expected = []
    for family in FAMILIES:
        differences = summary(DECODER / "head_from_zero" / family)["differences"]
        (found,) = (each for each in differences if (each["other"], each["steps"]) == (other, 10))
        expected.append(with_interval(found["mean"], found["by_tasks"]))
    assert rows_of(f"ahead of {row} by") == [expected]


def test_an_encoder_under_a_head():
    text = re.sub(r"\s+", " ", README)
    numbers = {
        start: [percent(score(ENCODER / family, start, 10)["mean"]) for family in FAMILIES]
        for start in ("meta-learned LoRA", "plain LoRA")
    }
    meta, plain = ("{}, {} and {}".format(*found) for found in numbers.values())
    assert f"meta-learned LoRA has {meta} % after 10 steps, plain LoRA {plain}," in text


@pytest.mark.parametrize("start", ["plain LoRA", "multi-task LoRA", "meta-learned LoRA"])
def test_what_writes_its_answers(start: str):
    """Exact match after 1, 3 and 10 steps, and the query loss after 10."""
    folder = EVIDENCE / "locale_formatting"
    after = {steps: score(folder, start, steps) for steps in (1, 3, 10)}
    last = after[10]
    expected = [percent(after[1]["mean"]), percent(after[3]["mean"]), with_interval(last["mean"], last["interval"])]
    expected.append(f"{last['loss']:.2f}")
    row = "multi-task LoRA, adapted too" if start == "multi-task LoRA" else start
    assert expected in rows_of(row)
