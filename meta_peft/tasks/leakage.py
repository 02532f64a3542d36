"""Tasks that are in two splits under different names: what is measured on them is memory, not adaptation.

Two tasks of different splits are reported as near duplicates if

- they share rows: the same input (with its context and choices, if it has them) with the same answer, in at least
  `SAME_ROWS` of the rows of the smaller one; or
- their texts are alike: the Jaccard similarity of their sets of character 8-grams is at least `ALIKE`, and it is not the
  case that they share inputs and mostly answer them differently, which is what makes them two tasks.

Similarities of texts are estimated by MinHash (Broder 1997) for all pairs, and computed for those that seem alike. Rows
are compared without regard to case, white space and how letters with accents are composed. Besides, for each pair of
splits, the rows are counted that stand in both: a query row of a test task may have been a support row of a training task.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.prompt import example_columns, read_columns
from meta_peft.tasks.task_set import TaskSet
from meta_peft.tasks.written import written

logger = logging.getLogger("meta_peft")

SAME_ROWS, ALIKE = 0.5, 0.8
MARGIN = 0.15  # by which an estimate of a Jaccard similarity may be too low: 2.5 deviations at 0.8 and so many hashes
LETTERS, HASHES = 8, 64
SHOWN = 5  # pairs in the log
READ_UNASKED = 200_000  # rows, for which this takes seconds; a large source should not wait for it

Array = np.ndarray


@dataclass(frozen=True)
class SameTask:
    """Two tasks that are nearly one.

    Args:
        splits, tasks: where they are, and what they are called.
        same_rows: share of the smaller one's rows that the other one has.
        same_inputs: share of the smaller one's inputs that the other one has.
        same_answers: of the inputs in both, the share that both answer alike; None if there are none.
        alike: the Jaccard similarity of their texts.
    """

    splits: tuple[str, str]
    tasks: tuple[str, str]
    same_rows: float
    same_inputs: float
    same_answers: float | None
    alike: float


@dataclass(frozen=True)
class Leakage:
    """What was found.

    Args:
        tasks: near duplicates across splits, those that share most first.
        rows: for each pair of splits, how many rows of the second one stand in the first one too.
    """

    tasks: list[SameTask]
    rows: dict[tuple[str, str], int]

    def to_dict(self) -> dict[str, Any]:
        rows = [{"splits": list(splits), "rows": count} for splits, count in self.rows.items()]
        return {"tasks": [asdict(pair) for pair in self.tasks], "rows_in_both": rows}

    def __str__(self) -> str:
        pairs = "; ".join(
            f"{pair.tasks[0]!r} ({pair.splits[0]}) and {pair.tasks[1]!r} ({pair.splits[1]}),"
            f" {pair.same_rows:.0%} of the rows"
            for pair in self.tasks[:SHOWN]
        )
        more = f"; and {len(self.tasks) - SHOWN} more" if len(self.tasks) > SHOWN else ""
        count = (
            "1 pair of tasks in different splits is"
            if len(self.tasks) == 1
            else f"{len(self.tasks)} pairs of tasks in different splits are"
        )
        return f"{count} nearly the same: {pairs}{more}."


def check_leakage(splits: Mapping[str, TaskSet], what_to_do: str) -> Leakage:
    """Look, and say what was found: in the log if `what_to_do` is warn, as an error if error; ignore does not look."""
    if what_to_do == "ignore":
        return Leakage([], {})
    n_rows = sum(len(rows) for tasks in splits.values() for rows in tasks.rows_of.values())
    if n_rows > READ_UNASKED and what_to_do == "warn":
        logger.info("%d rows are too many to look for tasks in two splits unasked: task_leakage=error looks.", n_rows)
        return Leakage([], {})
    found = find_leakage(splits)
    if found.tasks and what_to_do == "error":
        raise MetaPeftError(f"{found} Take one of each pair out, or set task_leakage=warn.")
    if found.tasks:
        logger.warning("%s What is measured on them is partly memory.", found)
    return found


def find_leakage(splits: Mapping[str, TaskSet]) -> Leakage:
    """Near duplicates among the tasks of different splits. Their rows have to be texts, not encoded."""
    read = {split: [_Texts.of(name, tasks.rows(name)) for name in tasks.names] for split, tasks in splits.items()}
    sketches = {split: np.stack([task.sketch() for task in tasks]) for split, tasks in read.items()}
    pairs: list[SameTask] = []
    rows: dict[tuple[str, str], int] = {}
    for one, other in combinations(read, 2):
        candidates = _sharing_rows(read[one], read[other]) | _alike(sketches[one], sketches[other])
        for i, j in sorted(candidates):
            pair = _compared((one, other), read[one][i], read[other][j])
            if pair is not None:
                pairs.append(pair)
        known = {row for task in read[one] for row in task.rows}
        rows[one, other] = sum(row in known for task in read[other] for row in task.rows)
    return Leakage(sorted(pairs, key=lambda pair: (-pair.same_rows, -pair.alike, pair.tasks)), rows)


@dataclass(frozen=True)
class _Texts:
    """A task's rows as pairs of input and answer, without what case, white space and composition add."""

    name: str
    rows: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, name: str, rows: list[dict[str, Any]]) -> _Texts:
        form, read = example_columns(rows[0].keys()), read_columns(rows[0].keys())
        columns = (*form[:-1], *read[len(form) :], form[-1])
        return cls(name, frozenset(_input_and_answer(row, columns) for row in rows))

    def answers(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for text, answer in self.rows:
            found[text].add(answer)
        return found

    def shingles(self) -> Array:
        """Hashes of all runs of `LETTERS` bytes, each once."""
        parts = []
        for text, answer in sorted(self.rows):
            line = np.frombuffer(f"{text}\t{answer}".encode().ljust(LETTERS), dtype=np.uint8)
            windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(line, LETTERS))
            parts.append(windows.view(np.uint64)[:, 0])
        return np.unique(_mixed(np.concatenate(parts)))

    def sketch(self) -> Array:
        """The smallest value of each of `HASHES` hash functions over the shingles."""
        keys = np.random.default_rng(0).integers(2**63, size=HASHES, dtype=np.uint64)
        smallest: Array = _mixed(self.shingles() ^ keys[:, None]).min(1)
        return smallest


def _input_and_answer(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, str]:
    if columns[-1] == "messages":  # a conversation, whose last turn is the answer
        turns = row["messages"]
        before, answer = (
            _plain(json.dumps(part, default=str, ensure_ascii=False)) for part in (turns[:-1], turns[-1:])
        )
        return before, answer
    read = (row[column] for column in columns[:-1])  # some rows may have no context, or no choices
    text = "\n".join(written(value) for value in read if value not in (None, ""))
    return _plain(text), _plain(written(row[columns[-1]]))


def _plain(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half of a surrogate pair
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()


def _mixed(values: Array) -> Array:
    """A hash of each 64-bit number (the finaliser of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed


def _sharing_rows(one: list[_Texts], other: list[_Texts]) -> set[tuple[int, int]]:
    """Places of the tasks that share at least `SAME_ROWS` of the smaller one's rows."""
    having: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, task in enumerate(one):
        for row in task.rows:
            having[row].append(i)
    sizes, found = np.array([len(task.rows) for task in one]), set()
    for j, task in enumerate(other):
        shared = np.zeros(len(one))
        for row in task.rows:
            shared[having.get(row, [])] += 1
        enough = SAME_ROWS * np.minimum(sizes, len(task.rows))
        found |= {(int(i), j) for i in np.flatnonzero(shared >= enough)}
    return found


def _alike(one: Array, other: Array) -> set[tuple[int, int]]:
    """Places of the tasks whose sketches ``[n, HASHES]`` agree as those of similar texts do."""
    found = set()
    for j, sketch in enumerate(other):
        found |= {(int(i), j) for i in np.flatnonzero((one == sketch).mean(1) >= ALIKE - MARGIN)}
    return found


def _compared(splits: tuple[str, str], one: _Texts, other: _Texts) -> SameTask | None:
    """The pair, if it is one to report."""
    fewest = min(len(one.rows), len(other.rows))
    same_rows = len(one.rows & other.rows) / fewest
    mine, its = one.answers(), other.answers()
    both = mine.keys() & its.keys()
    same_answers = sum(bool(mine[text] & its[text]) for text in both) / len(both) if both else None
    same_inputs = len(both) / min(len(mine), len(its))
    answer_differently = same_answers is not None and same_inputs >= 0.5 and same_answers < 0.5
    if same_rows < SAME_ROWS and answer_differently:
        return None
    of_one, of_other = one.shingles(), other.shingles()
    in_both = len(np.intersect1d(of_one, of_other, assume_unique=True))
    alike = in_both / (len(of_one) + len(of_other) - in_both)
    if same_rows < SAME_ROWS and alike < ALIKE:
        return None
    return SameTask(splits, (one.name, other.name), same_rows, same_inputs, same_answers, float(alike))
