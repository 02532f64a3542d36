from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from meta_peft import MetaPeftError
from meta_peft.evaluation.evaluate import Curve
from meta_peft.evaluation.intervals import interval
from meta_peft.evaluation.report import Report

PLAIN = Curve((0, 3), np.array([[2.0, 1.0], [4.0, 2.0]]), np.array([[0.0, 0.5], [0.0, 1.0]]), (1.0, 0.5))
META = Curve((0, 3), np.array([[1.5, 0.25], [2.5, 0.75]]), np.array([[0.25, 1.0], [0.0, 1.0]]), (1.0, 2.0))
IN_CONTEXT = np.array([3.0, 5.0]), np.array([0.5, 0.25])


@pytest.fixture
def report() -> Report:
    return Report(["a", "ß"], {"plain": PLAIN, "meta": META}, {"seed": 0}, IN_CONTEXT)


def test_rows_are_means_and_worst_cases_over_tasks(report: Report):
    rows = report.rows()
    assert [(r["start"], r["steps"], r["rate_factor"], r["tasks"]) for r in rows] == [
        ("plain", 0, 1.0, 2),
        ("plain", 3, 0.5, 2),
        ("meta", 0, 1.0, 2),
        ("meta", 3, 2.0, 2),
        ("in-context examples", 0, None, 2),
    ]
    assert [(r["loss"], r["worst_loss"]) for r in rows] == [(3.0, 4.0), (1.5, 2.0), (2.0, 2.5), (0.5, 0.75), (4.0, 5.0)]
    matches = [(r["exact_match"], r["worst_exact_match"]) for r in rows]
    assert matches == [(0.0, 0.0), (0.75, 0.5), (0.125, 0.0), (1.0, 1.0), (0.375, 0.25)]
    assert rows[1]["loss_interval"] == interval(PLAIN.loss[:, 1]) == (1.0, 2.0)
    assert rows[1]["exact_match_interval"] == (0.5, 1.0)


def test_the_table(report: Report):
    lines = report.markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].split("|")[1:4] == [" start ", " steps ", " query loss "]
    assert lines[2:] == [
        "| plain | 0 | 3.00 | 4.00 | 0 (0 to 0) | 0 |  |",
        "| plain | 3 | 1.50 | 2.00 | 75 (50 to 100) | 50 | 0.5 |",
        "| meta | 0 | 2.00 | 2.50 | 12 (0 to 25) | 0 |  |",
        "| meta | 3 | 0.50 | 0.75 | 100 (100 to 100) | 100 | 2 |",
        "| in-context examples | 0 | 4.00 | 5.00 | 38 (25 to 50) | 25 |  |",
    ]


def test_a_metric_of_which_less_is_better():
    curve = Curve((3,), np.array([[1.0], [2.0]]), np.array([[0.25], [0.75]]), (1.0,), "wer")
    (row,) = Report(["a", "b"], {"meta": curve}, {}).rows()
    assert (row["wer"], row["worst_wer"], row["wer_interval"]) == (0.5, 0.75, (0.25, 0.75))
    lines = Report(["a", "b"], {"meta": curve}, {}).markdown().splitlines()
    assert lines[0].endswith("| WER, % (95 % interval) | worst task, % | rate x |")
    assert lines[2] == "| meta | 3 | 1.50 | 2.00 | 50 (25 to 75) | 75 | 1 |"


def test_a_metric_without_a_unit():
    curve = Curve((0,), np.array([[1.0]]), np.array([[55.4]]), (1.0,), "chrf")
    lines = Report(["a"], {"meta": curve}, {}).markdown().splitlines()
    assert lines[0].endswith("| chrF (95 % interval) | worst task | rate x |")
    assert lines[2] == "| meta | 0 | 1.00 | 1.00 | 55 (55 to 55) | 55 |  |"


def test_curves_of_two_metrics_are_no_report():
    other = Curve((0, 3), META.loss, META.score, META.factors, "chrf")
    with pytest.raises(MetaPeftError, match="of one metric; these are of chrf and exact_match"):
        Report(["a", "b"], {"plain": PLAIN, "meta": other}, {}).rows()


def test_without_in_context_examples():
    report = Report(["a", "b"], {"meta": META}, {})
    assert [r["start"] for r in report.rows()] == ["meta", "meta"]
    assert "in-context" not in report.markdown()


def test_the_files(report: Report, tmp_path: Path):
    folder = tmp_path / "a" / "b"
    made = report.write(folder)
    assert made == [folder / name for name in ("results.json", "results.md", "results.png")]
    assert {path.name for path in folder.iterdir()} == {path.name for path in made}
    assert (folder / "results.md").read_text() == report.markdown() + "\n"
    values = json.loads((folder / "results.json").read_text())
    assert values["run"] == {"seed": 0}
    assert values["tasks"] == ["a", "ß"]
    assert values["metric"] == "exact_match"
    assert values["rows"] == json.loads(json.dumps(report.rows()))
    assert values["by_task"]["meta"] == {"loss": META.loss.tolist(), "exact_match": META.score.tolist()}
    assert values["by_task"]["in-context examples"] == {"loss": [3.0, 5.0], "exact_match": [0.5, 0.25]}
    image = matplotlib.image.imread(folder / "results.png")
    assert image.shape[0] > 300
    assert image.shape[1] > 1000
    assert image[..., :3].std() > 0.05, "a blank picture"


def test_the_plot_shows_the_curves(report: Report, tmp_path: Path):
    """Other numbers, another picture; the same numbers, the same picture."""
    other = Report(report.tasks, {"plain": PLAIN, "meta": PLAIN}, {}, IN_CONTEXT)
    pictures = []
    for name, one in (("a", report), ("b", report), ("c", other)):
        one.plot(tmp_path / f"{name}.png")
        pictures.append(matplotlib.image.imread(tmp_path / f"{name}.png"))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_an_error_while_writing_leaves_the_old_results(report: Report, tmp_path: Path):
    report.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = Report(report.tasks, {"plain": PLAIN}, {"what": object()})  # nothing that JSON can hold
    with pytest.raises(TypeError):
        broken.write(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_without_matplotlib(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MetaPeftError, match=r"The plot needs matplotlib: pip install 'meta-peft\[demo\]'"):
        report.plot(tmp_path / "x.png")
