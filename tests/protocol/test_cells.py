"""The files that a comparison is kept in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from meta_peft import MetaPeftError
from meta_peft.protocol.arguments import ProtocolArguments
from meta_peft.protocol.cells import Cell, Found, MeasuredWith, all_found, cells_of, path_of, trained_for

LOSS, SCORE, COUNTS = [[2.0, 1.0]] * 2, [[0.0, 0.5]] * 2, [[[1, 0.5, 1]]]
FOUND = Found(Cell(1, "meta"), "exact_match", ["a", "b"], [0, 10], [1.0, 0.5], LOSS, SCORE, COUNTS, 10, options="these")


def test_a_cell_is_read_as_it_was_written(tmp_path: Path):
    FOUND.write(tmp_path)
    assert all_found(tmp_path) == [FOUND]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["seed1-meta.json"]


def test_a_cell_that_does_not_say_its_protocol_is_of_the_first(tmp_path: Path):
    """Those that were measured before there were two: they stay readable, and are told apart."""
    replace(FOUND, protocol=2).write(tmp_path)
    file = path_of(FOUND.cell, tmp_path)
    said = json.loads(file.read_text())
    assert said.pop("protocol") == 2
    file.write_text(json.dumps(said))
    assert [found.protocol for found in all_found(tmp_path)] == [1]


NOW = MeasuredWith("these", "rows", "weights")


@pytest.mark.parametrize("now", [NOW, replace(NOW, options="new", earlier=("these",))])
@pytest.mark.parametrize("before", [{}, {"inputs": "rows", "base": "weights"}])
def test_cells_of_the_same_options_are_read(tmp_path: Path, now: MeasuredWith, before: dict):
    """Those of before there were digests of the rows and of the base say nothing about them."""
    found = replace(FOUND, **before)
    found.write(tmp_path)
    assert all_found(tmp_path, now) == [found]


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({"options": "those"}, "other options or other data"),
        ({"inputs": "other rows"}, "other options or other data"),
        ({"base": "other weights"}, "other weights of the base, under the same name"),
    ],
)
def test_cells_of_something_else_are_refused(tmp_path: Path, before: dict, said: str):
    replace(FOUND, **before).write(tmp_path)
    with pytest.raises(MetaPeftError, match=f"seed1-meta.json was measured with {said}. Give what it was measured"):
        all_found(tmp_path, NOW)


def test_a_start_is_trained_for_as_long_with_each_seed():
    def found(start: str, seed: int, steps: float, task_count: int | None = None) -> Found:
        return replace(FOUND, cell=Cell(seed, start, task_count), cost={"outer_steps": steps})

    one = [found("meta", 0, 70.0), found("meta", 1, 70.0), found("multitask", 0, 120.0), found("meta", 0, 60.0, 4)]
    untrained = [found("plain", 0, 0.0), replace(FOUND, cell=Cell(1, "plain"))]
    assert trained_for([*one, *untrained]) == {("meta", None): 70, ("multitask", None): 120, ("meta", 4): 60}
    with pytest.raises(
        MetaPeftError, match="seed1-multitask is trained for 150 outer steps, and this start for 120 with"
    ):
        trained_for([*one, found("multitask", 1, 150.0)])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cell": 3}', '{"cell": {"seed": 1, "start": "meta"}, "more": 1}'])
def test_a_damaged_cell_is_named(tmp_path: Path, text: str):
    FOUND.write(tmp_path)
    path_of(FOUND.cell, tmp_path).write_text(text)
    with pytest.raises(MetaPeftError, match=r"seed1-meta.json is damaged or not a cell"):
        all_found(tmp_path)


def test_a_cell_in_the_file_of_another_is_named(tmp_path: Path):
    """Once it counted twice in the means of its own seed."""
    FOUND.write(tmp_path)
    path_of(FOUND.cell, tmp_path).rename(path_of(Cell(2, "meta"), tmp_path))
    with pytest.raises(MetaPeftError, match=r"seed2-meta.json is damaged .* \(it is the cell seed1-meta\): remove it"):
        all_found(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"loss": [[2.0, 1.0]]},
        {"score": [[0.0], [0.5]]},
        {"score": [[0.0, 0.5], [0.5]]},
        {"factors": []},
        {"loss": None},
    ],
    ids=str,
)
def test_numbers_of_a_cell_that_are_too_few(damage: dict):
    """Once a traceback, with no word of which cell it was."""
    whole = replace(FOUND, calibration=[*COUNTS, *COUNTS])
    whole.check_sizes()
    with pytest.raises(MetaPeftError, match="The cell seed1-meta is damaged: its numbers are not those of 2 tasks"):
        replace(whole, **damage).check_sizes()
    with pytest.raises(MetaPeftError, match="The cell seed1-meta is damaged"):
        replace(whole, at=3).check_sizes()


def test_every_seed_has_every_start_and_numbers_of_tasks_are_of_trained_ones():
    arguments = ProtocolArguments(starts=["plain", "meta"], seeds=[3, 1], task_counts=[2])
    names = [cell.name for cell in cells_of(arguments, arguments.starts)]
    assert names == ["seed3-plain", "seed3-meta", "seed3-meta-2tasks", "seed1-plain", "seed1-meta", "seed1-meta-2tasks"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": []}, "at least one"),
        ({"starts": ["plain", "mete"]}, "Did you mean 'meta'"),
        ({"seeds": []}, "one or more different"),
        ({"seeds": [1, 1]}, "one or more different"),
        ({"seeds": [-1]}, "seeds must be a number of 0 or more"),
        ({"shots_curve": [0]}, "shots_curve must be a number of 1 or more"),
        ({"task_counts": [0]}, "task_counts must be a number of 1 or more"),
    ],
)
def test_arguments_that_make_no_comparison(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        ProtocolArguments(**options)


def test_a_cell_of_another_number_of_tasks_has_another_file():
    assert path_of(replace(FOUND.cell, task_count=4), Path("x")).name == "seed1-meta-4tasks.json"
