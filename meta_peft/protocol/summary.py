"""What the cells of a comparison say together.

Each task is averaged over seeds first; the interval of a start is over tasks. Starts face the same episodes, so they are
compared task by task and seed by seed: the interval of a difference is that of the mean of the differences, over tasks and
seeds, since what is asked is which start is better, whatever the seed of its training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from meta_peft.comparison.rate_edges import at_the_edge
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.evaluate import Curve, calibration_error
from meta_peft.evaluation.intervals import interval
from meta_peft.evaluation.metrics import Metric
from meta_peft.evaluation.report import Report
from meta_peft.protocol.arguments import IN_CONTEXT, META, TITLES
from meta_peft.protocol.cells import PROTOCOL, Found


class NothingToCompareError(MetaPeftError):
    """What was measured so far makes no comparison."""


@dataclass(frozen=True)
class Difference:
    """How far the meta-learned start is ahead of another, in the metric; above 0 is better, whatever the metric.

    Args:
        steps: of both. In-context examples take none.
        interval: 95 % interval over tasks and seeds; with one seed, over tasks.
        by_seed: for each seed alone.
        of_gains: how much more adaptation gains from this start than from the other (the interaction), with its interval;
            None for in-context examples.
    """

    other: str
    steps: int
    mean: float
    interval: tuple[float, float]
    by_seed: tuple[float, ...]
    of_gains: tuple[float, tuple[float, float]] | None

    @property
    def ahead(self) -> bool:
        return self.interval[0] > 0

    @property
    def behind(self) -> bool:
        return self.interval[1] < 0


@dataclass(frozen=True)
class Summary:
    """Cells of the same options; `about` is what the run was.

    `left_out` are seeds that only some starts were measured with, and which ones.
    """

    found: Sequence[Found]
    about: dict[str, Any]
    seeds: tuple[int, ...]
    left_out: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Sequence[Found], about: dict[str, Any]) -> Summary:
        """Of the seeds for which every start was measured.

        Raises:
            NothingToCompareError: there is no such seed yet, or no start that adapts.
            MetaPeftError: a cell is damaged.
        """
        for each in found:
            each.check_sizes()
        kinds = {(each.cell.start, each.cell.task_count) for each in found}
        by_kind = [{f.cell.seed for f in found if (f.cell.start, f.cell.task_count) == kind} for kind in kinds]
        seeds = sorted(set.intersection(*by_kind))
        if not seeds:
            raise NothingToCompareError("No seed has all its starts measured yet: go on measuring.")
        if all(start == IN_CONTEXT for start, _ in kinds):
            raise NothingToCompareError(
                "In-context examples have nothing to be compared with yet: measure another start."
            )
        others = sorted({f.cell.seed for f in found} - set(seeds))
        left_out = {
            seed: tuple(s for s in TITLES if any((f.cell.seed, f.cell.start) == (seed, s) for f in found))
            for seed in others
        }
        return cls([f for f in found if f.cell.seed in seeds], about, tuple(seeds), left_out)

    @cached_property
    def tasks(self) -> list[str]:
        return sorted(self.found[0].tasks)

    @property
    def at(self) -> int:
        """The number of steps that is compared along shots and numbers of tasks, and in the verdict."""
        return self.found[0].at

    @property
    def shots(self) -> int:
        """Support rows of a task, in training and where nothing else is said."""
        return int(self.about["training"]["shots"])

    @property
    def query_rows(self) -> int | None:
        """The fewest that a task was judged on; None if a cell does not say."""
        found = [f.query_rows for f in self.found]
        return None if None in found else min(n for n in found if n is not None)

    @property
    def ways(self) -> int | None:
        """Of how many classes an episode is, if it is of classes; `shots` are then of each."""
        ways: int | None = self.about["training"].get("ways")
        return ways

    @property
    def renames_classes(self) -> bool:
        """Whether what a class is called is drawn anew for each episode."""
        return self.about["training"].get("label_words", "given") != "given"

    @property
    def starts(self) -> list[str]:
        """Names of starts, in the order of tables."""
        return [start for start in TITLES if any(f.cell.start == start for f in self.found)]

    @property
    def metric(self) -> Metric:
        return self.report.metric

    def of_start(self, start: str, task_count: int | None = None) -> list[Found]:
        """One for each seed."""
        return [f for f in self.found if (f.cell.start, f.cell.task_count) == (start, task_count)]

    @cached_property
    def report(self) -> Report:
        """All starts that were trained on all tasks."""
        curves = {TITLES[s]: self._curve(s) for s in self.starts if s != IN_CONTEXT}
        in_context = None
        if IN_CONTEXT in self.starts:
            loss, score = (self._values(self.of_start(IN_CONTEXT), key).mean(0) for key in ("loss", "score"))
            in_context = loss[:, 0], score[:, 0]
        return Report(self.tasks, curves, {**self.about, "seeds": list(self.seeds)}, in_context)

    def calibration(self, start: str) -> list[float]:
        """The calibration error of single labels after each number of steps, all tasks and seeds together."""
        counts = np.sum([f.calibration for f in self.of_start(start)], axis=0)
        return [calibration_error(counts_K3) for counts_K3 in counts]

    def differences(self) -> list[Difference]:
        """Of the meta-learned start, if it was measured, to every other one, at every number of steps."""
        return [
            self._difference(other, steps)
            for meta in self.of_start(META)[:1]
            for other in self.starts
            if other != META
            for steps in ([self.at] if other == IN_CONTEXT else meta.steps)
        ]

    def at_by_seed(self, start: str, task_count: int | None = None) -> np.ndarray:
        """Scores after `at` steps, ``[N, T]`` of N seeds; those of in-context examples, which take none."""
        cells = self.of_start(start, task_count)
        column = cells[0].steps.index(self.at) if self.at in cells[0].steps else 0
        return self._values(cells, "score")[..., column]

    def along_shots(self) -> dict[str, dict[int, np.ndarray]]:
        """The score by task after `at` steps, for each start and each number of support rows."""
        found: dict[str, dict[int, np.ndarray]] = {}
        for start in self.starts:
            cells = self.of_start(start)
            by_shots = {self.shots: self.at_by_seed(start).mean(0)}
            for n in cells[0].shots:
                by_shots[int(n)] = np.mean([_ordered(f, f.shots[n]["score"], self.tasks) for f in cells], axis=0)
            found[start] = dict(sorted(by_shots.items()))
        return found

    def along_tasks(self) -> dict[str, dict[int, np.ndarray]]:
        """The score by task after `at` steps, for each trained start and each number of training tasks."""
        found: dict[str, dict[int, np.ndarray]] = {}
        for start in self.starts:
            counts = sorted({f.cell.task_count for f in self.found if f.cell.start == start and f.cell.task_count})
            if counts:
                every = int(self.about["tasks"]["n_train"])
                by_count = {n: self.at_by_seed(start, n).mean(0) for n in counts}
                found[start] = {**by_count, every: self.at_by_seed(start).mean(0)}
        return found

    def along_training(self) -> dict[str, dict[float, float | None]]:
        """The lowest query loss on the validation tasks after `at` steps, the mean over seeds, for each trained start and
        each part of its training after which it was tried; None where a seed's is not finite.

        Of starts whose cells all have it.
        """
        found: dict[str, dict[float, float | None]] = {}
        for start in self.starts:
            cells = [cell for cell in self.of_start(start) if cell.cell.trained]
            parts = set.intersection(*(set(cell.along_training) for cell in cells)) if cells else set()
            for part in sorted(parts, key=float) if len(parts) > 1 else ():
                losses = [cell.along_training[part][cell.steps.index(self.at)] for cell in cells]
                finite = [loss for loss in losses if loss is not None]
                mean = float(np.mean(finite)) if len(finite) == len(losses) else None
                found.setdefault(start, {})[float(part)] = mean
        return found

    def at_the_edge(self, start: str) -> dict[str, list[int]]:
        """See `rate_edges.at_the_edge`."""
        cells = self.of_start(start)
        return at_the_edge(cells[0].steps, [cell.factors for cell in cells], self.about["comparison"]["rate_factors"])

    @property
    def by_earlier_protocols(self) -> dict[str, int]:
        """Trained starts, and in how many seeds they were measured as one does no longer (`cells.PROTOCOL`)."""
        return dict(Counter(f.cell.start for f in self.found if f.cell.trained and f.protocol < PROTOCOL))

    def cost(self, start: str) -> dict[str, float]:
        """Means over seeds."""
        cells = self.of_start(start)
        return {name: float(np.mean([f.cost[name] for f in cells])) for name in cells[0].cost}

    def _curve(self, start: str) -> Curve:
        cells = self.of_start(start)
        factors = tuple(f[0] if len(set(f)) == 1 else None for f in zip(*(c.factors for c in cells), strict=True))
        rules = [c.how or [""] * len(c.steps) for c in cells]
        how = tuple(map(_in_seeds, zip(*rules, strict=True)))
        loss, score = (self._values(cells, key).mean(0) for key in ("loss", "score"))
        return Curve(tuple(cells[0].steps), loss, score, factors, cells[0].metric, how=how)

    def _values(self, cells: list[Found], key: str) -> np.ndarray:
        """``[N, T, S]`` of N seeds."""
        return np.stack([_ordered(f, getattr(f, key), self.tasks) for f in cells])

    def _difference(self, other: str, steps: int) -> Difference:
        sign = 1.0 if self.metric.higher_is_better else -1.0
        mine, its = self.of_start(META), self.of_start(other)
        columns = [mine[0].steps.index(steps), its[0].steps.index(steps) if other != IN_CONTEXT else 0]
        scores = [self._values(cells, "score") for cells in (mine, its)]
        at = [values[..., column] for values, column in zip(scores, columns, strict=True)]
        ahead = sign * (at[0] - at[1])  # [N, T]
        gains = None
        if other != IN_CONTEXT and 0 in mine[0].steps and steps > 0:
            before = [values[..., mine[0].steps.index(0)] for values in scores]
            more = ahead - sign * (before[0] - before[1])
            gains = float(more.mean()), interval(more)
        return Difference(other, steps, float(ahead.mean()), interval(ahead), tuple(ahead.mean(1).tolist()), gains)


def _in_seeds(how: Sequence[str]) -> str:
    """What is not the same in all seeds, with the number of seeds."""
    counts = Counter(each for each in how if each)
    return ", ".join(
        each if n == len(how) else f"{each} ({n} of {len(how)} seeds)" for each, n in sorted(counts.items())
    )


def _ordered(found: Found, by_task: Sequence[Any], tasks: Sequence[str]) -> np.ndarray:
    place = {task: i for i, task in enumerate(found.tasks)}
    if set(place) != set(tasks):
        raise MetaPeftError(
            f"The cell {found.cell.name} is of other held-out tasks than the rest: remove it to have it measured again."
        )
    return np.array([by_task[place[task]] for task in tasks], dtype=float)
