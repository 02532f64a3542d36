"""The numbers of the README and of docs/when.md are those of the recorded runs: one that is measured again shows in all."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from surface import ROOT

from meta_peft.evaluation.intervals import interval

EVIDENCE = ROOT / "benchmarks" / "results" / "evidence"
DECODER = EVIDENCE / "decoder_classification"
ENCODER = EVIDENCE / "encoder_classification"
FAMILIES = ("definitions", "topics", "sentiment")  # in the order of the README's columns
README, WHEN = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/when.md"))
STARTS = {"plain": "plain LoRA", "multitask": "multi-task LoRA", "classifier": "one classifier, new head"}
STARTS |= {"in_context": "in-context examples", "meta": "meta-learned LoRA"}


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


def rows_of(first: str, page: str = README) -> list[list[str]]:
    """The other cells of the table rows of `page` that begin with `first`."""
    rows = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip().replace("**", "") for cell in row.strip("|").split("|")[1:]] for row in rows]


def after(folder: Path, start: str, *steps: int) -> str:
    """The scores of a start after so many steps; nothing if it was not measured."""
    if STARTS[start] not in {row["start"] for row in summary(folder)["rows"]}:
        return ""
    return ", ".join(percent(score(folder, STARTS[start], n)["mean"]) for n in steps)


def ahead_of(folder: Path, start: str) -> str:
    """By how much the meta-learned start is, after ten steps."""
    found = [each for each in summary(folder)["differences"] if (each["other"], each["steps"]) == (start, 10)]
    return with_interval(found[0]["mean"], found[0]["interval"]) if found else ""


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ("multi-task LoRA, adapted too", "multi-task LoRA"),
        ("one classifier of all training labels, new head", "one classifier, new head"),
        ("**meta-learned LoRA**", "meta-learned LoRA"),
    ],
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


@pytest.mark.parametrize(
    ("row", "other"), [("plain LoRA", "plain"), ("multi-task LoRA", "multitask"), ("the one classifier", "classifier")]
)
def test_by_how_much_it_is_ahead(row: str, other: str):
    """With the lowest and the highest difference of a seed where the row below says so."""
    expected, seeds = [], []
    for family in FAMILIES:
        differences = summary(DECODER / "head_from_zero" / family)["differences"]
        (found,) = (each for each in differences if (each["other"], each["steps"]) == (other, 10))
        expected.append(with_interval(found["mean"], found["interval"]))
        seeds.append(f"{percent(min(found['by_seed']))} to {percent(max(found['by_seed']))}")
    assert rows_of(f"ahead of {row} by") == [expected]
    if other != "plain":
        assert seeds in rows_of("by seed")


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


def test_by_how_much_where_a_model_writes():
    text = re.sub(r"\s+", " ", README)
    folder = EVIDENCE / "locale_formatting"
    plain, prompt = ahead_of(folder, "plain"), ahead_of(folder, "in_context")
    assert "is {} points ahead of plain LoRA after 10 steps ({} and".format(*plain.split(" (")) in text
    assert "and {} ahead of examples in the prompt ({}".format(*prompt.split(" (")) in text
    (behind,) = (d for d in summary(folder)["differences"] if (d["other"], d["steps"]) == ("multitask", 10))
    bounds = sorted(-bound for bound in behind["interval"])
    assert "is {} points ahead of it ({} to {}), in each seed".format(*map(percent, (-behind["mean"], *bounds))) in text
    assert max(behind["by_seed"]) < 0
    folder = EVIDENCE / "data_wrangling"
    meta, plain, multitask = (after(folder, start, 1, 3, 10) for start in ("meta", "plain", "multitask"))
    meta, plain, multitask = (" and ".join(each.rsplit(", ", 1)) for each in (meta, plain, multitask))
    said = f"(five seeds), meta-learned LoRA has {meta} % after 1, 3 and 10 steps, plain LoRA {plain}, and multi-task LoRA,"
    assert f"{said} stopped early where the validation tasks say so, {multitask}." in text
    assert len(summary(folder)["seeds"]) == 5


@pytest.mark.parametrize(
    ("row", "base", "folder"),
    [
        ("definitions of words, four classes", "SmolLM2", DECODER / "head_from_zero" / "definitions"),
        ("topics of words, four classes", "SmolLM2", DECODER / "head_from_zero" / "topics"),
        ("praise or complaint, a new domain", "SmolLM2", DECODER / "head_from_zero" / "sentiment"),
        ("definitions of words, four classes", "MiniLM", ENCODER / "definitions"),
        ("topics of words, four classes", "MiniLM", ENCODER / "topics"),
        ("praise or complaint, a new domain", "MiniLM", ENCODER / "sentiment"),
    ],
)
def test_when_to_use_it_under_a_head(row: str, base: str, folder: Path):
    assert len(summary(folder)["seeds"]) == 5
    (found,) = (cells[1:] for cells in rows_of(row, WHEN) if cells[0] == base)
    del found[3]  # in context, which has runs of its own
    of_classifier = found.pop()
    assert found == [
        *(after(folder, s, 1, 10) for s in ("plain", "multitask", "classifier", "meta")),
        ahead_of(folder, "plain"),
    ]
    assert of_classifier in (ahead_of(folder, "classifier"), "level (one seed)")


@pytest.mark.parametrize(
    ("row", "folder"),
    [
        ("[locale formatting]({results}/locale_formatting/RUN.md)", EVIDENCE / "locale_formatting"),
        ("the same, three times the training", EVIDENCE / "locale_formatting" / "longer"),
        ("[data wrangling]({results}/data_wrangling/RUN.md)", EVIDENCE / "data_wrangling"),
        ("[questions on new relations]({results}/question_answering/RUN.md)", EVIDENCE / "question_answering"),
        ("[lemmas in new languages]({results}/lemmatisation/RUN.md)", EVIDENCE / "lemmatisation"),
    ],
)
def test_when_to_use_it_where_a_model_writes(row: str, folder: Path):
    (found,) = rows_of(row.format(results="../benchmarks/results/evidence"), WHEN)
    starts = ((start, steps) for start, steps in (("plain", (3, 10)), ("multitask", (3, 10)), ("in_context", (0,))))
    expected = [str(len(summary(folder)["seeds"])), "exact match, %", *(after(folder, s, *n) for s, n in starts)]
    expected += [after(folder, "meta", 3, 10), ahead_of(folder, "plain"), ahead_of(folder, "multitask")]
    assert found == expected
