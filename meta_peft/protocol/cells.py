"""The cells of a comparison, and the file that each is kept in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.protocol.arguments import IN_CONTEXT, UNTRAINED, ProtocolArguments
from meta_peft.utils.atomic_files import write_file
from meta_peft.utils.checked import read_object
from meta_peft.utils.digests import of_texts

FOLDER = "cells"
PROTOCOL = 2
"""How trained starts are measured. 1: at the end of their training, the meta-learned one by the run's own rule alone. 2: at
the point of it, and by the rule, that the validation tasks choose."""


@dataclass(frozen=True)
class Cell:
    """A start of one seed, trained on all training tasks or on `task_count` of them."""

    seed: int
    start: str
    task_count: int | None = None

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.start}" + (f"-{self.task_count}tasks" if self.task_count else "")

    @property
    def trained(self) -> bool:
        return self.start not in UNTRAINED


@dataclass(frozen=True)
class Found:
    """What was measured in a cell: values by task, ``[T][S]`` for T tasks and S numbers of steps.

    Args:
        factors: the rate factor chosen for each number of steps, ``[S]``.
        how: by which other rule than the run's own, in words, for each number of steps, ``[S]``.
        calibration: counts by number of steps and bin, ``[S][K][3]`` (see `evaluate.Curve`).
        shots: for each other number of support rows, loss and score by task after `at` steps.
        along_training: for each part of the training that was tried, the lowest mean query loss on the validation tasks,
            ``[S]``; None where it is not finite. Empty in cells of before it was kept.
        at: the number of steps that is compared along shots and numbers of tasks.
        cost: outer steps and seconds of training, support tokens and seconds of adaptation (see `measure`).
        options, inputs, base: see `MeasuredWith`; the latter two are empty in cells of before there was one.
        protocol: see `PROTOCOL`; 1 where a cell does not say.
        query_rows: of each task; None in cells of before it was kept.
    """

    cell: Cell
    metric: str
    tasks: list[str]
    steps: list[int]
    factors: list[float | None]
    loss: list[list[float]]
    score: list[list[float]]
    calibration: list[list[list[float]]]
    at: int
    how: list[str] = field(default_factory=list)
    shots: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    along_training: dict[str, list[float | None]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    options: str = ""
    inputs: str = ""
    base: str = ""
    protocol: int = 1
    query_rows: int | None = None

    def write(self, folder: Path) -> None:
        write_file(path_of(self.cell, folder), json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, file: Path) -> Found:
        values = read_object(file, "a cell of a comparison")
        try:
            found = cls(**{**values, "cell": Cell(**values["cell"])})
            if found.cell.name != file.stem:
                raise ValueError(f"it is the cell {found.cell.name}")
        except (KeyError, TypeError, ValueError) as error:
            raise MetaPeftError(f"{file} is damaged or not a cell of a comparison ({error}): remove it.") from error
        return found

    def check_sizes(self) -> None:
        """Raise `MetaPeftError` unless there are as many numbers as tasks and numbers of steps."""
        tasks, steps = len(self.tasks), len(self.steps)
        try:
            fits = np.shape(self.loss) == np.shape(self.score) == (tasks, steps)
            fits &= len(self.factors) == len(self.calibration) == steps
            fits &= self.cell.start == IN_CONTEXT or self.at in self.steps
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise MetaPeftError(
                f"The cell {self.cell.name} is damaged: its numbers are not those of {tasks} tasks after {steps} numbers of"
                " steps. Remove it to have it measured again."
            )


@dataclass(frozen=True)
class MeasuredWith:
    """What a cell depends on, as digests.

    Args:
        options: of all options of the comparison and of the run that are recorded.
        inputs: of all options of the training, and of the rows.
        base: of the weights of the base.
        earlier: what `options` were in earlier versions.
    """

    options: str
    inputs: str
    base: str
    earlier: tuple[str, ...] = ()

    def other_than(self, found: Found) -> str:
        """What a cell was measured with that is something else now, in words; empty if it is all the same."""
        if found.options not in (self.options, *self.earlier) or found.inputs not in ("", self.inputs):
            return "other options or other data"
        return "other weights of the base, under the same name" if found.base not in ("", self.base) else ""


def path_of(cell: Cell, folder: Path) -> Path:
    return folder / FOLDER / f"{cell.name}.json"


def cells_of(arguments: ProtocolArguments, starts: Sequence[str]) -> Iterator[Cell]:
    """All cells, seed by seed, so that a run that is stopped has whole seeds."""
    for seed in arguments.seeds:
        for start in starts:
            yield Cell(seed, start)
            for count in arguments.task_counts or ():
                if Cell(seed, start).trained:
                    yield Cell(seed, start, count)


def all_found(folder: Path, now: MeasuredWith | None = None) -> list[Found]:
    """What was measured so far, in the order of names.

    Raises:
        MetaPeftError: a cell was measured with something else than what there is `now`.
    """
    found = [Found.read(file) for file in sorted((folder / FOLDER).glob("*.json"))]
    for each in found:
        if now is not None and (other := now.other_than(each)):
            raise MetaPeftError(
                f"{path_of(each.cell, folder)} was measured with {other}. Give what it was measured with, another"
                " output_dir, or remove it to have it measured again."
            )
    return found


def trained_for(found: Sequence[Found]) -> dict[tuple[str, int | None], int]:
    """For how many outer steps the starts of `found` were trained, by start and number of training tasks.

    Raises:
        MetaPeftError: a start was trained for longer with one seed than with another, so that they are not one start.
    """
    lengths: dict[tuple[str, int | None], int] = {}
    for each in found:
        if each.cell.trained:
            steps = int(each.cost["outer_steps"])
            check_length(each.cell, steps, lengths)
            lengths[each.cell.start, each.cell.task_count] = steps
    return lengths


def check_length(cell: Cell, steps: int, lengths: Mapping[tuple[str, int | None], int]) -> None:
    """Raise `MetaPeftError` if a start is trained for another number of outer steps in this cell than in others."""
    expected = lengths.get((cell.start, cell.task_count), steps)
    if steps != expected:
        raise MetaPeftError(
            f"{cell.name} is trained for {steps} outer steps, and this start for {expected} with another seed: together"
            " they would be no one start. How many steps are of equal compute depends on frozen_cache_gb and memory too,"
            " and an earlier version may have counted otherwise. Give the options that the other cells were measured with,"
            " another output_dir, or remove the other cells."
        )


def digest(*parts: Any) -> str:
    """What options a cell was measured with, in a few characters."""
    return of_texts(json.dumps(parts, sort_keys=True, default=str))
