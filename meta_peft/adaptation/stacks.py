"""Adaptation of stacks of tasks: encoded support rows in, each task's adapted weights out, a stack at a time."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from meta_peft.adapters import hub
from meta_peft.adapters.card import adapted_card
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop import inner_loop
from meta_peft.inner_optimizers.rule import RATES, scaled
from meta_peft.params import per_task, take_task
from meta_peft.tasks.collate import row_length
from meta_peft.tasks.prompt import example_columns
from meta_peft.types import Params, Rows
from meta_peft.utils.checked import is_number, shown, whole
from meta_peft.utils.memory import or_out_of_memory
from meta_peft.utils.words import listed

logger = logging.getLogger("meta_peft")

MOST = 10**6  # steps, or tasks in a forward
Examples = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Adapted:
    """One task's adapted weights, and its support loss ``before`` and ``after`` adaptation.

    `objective` is what the base is for, `num_labels` how many classes its head has, and `label_names` the names of the
    classes, by number, of a task whose labels have names.
    """

    weights: Params
    metrics: dict[str, float]
    config: Any
    base_name: str
    objective: str
    num_labels: int = 0
    label_names: tuple[str, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Write an ordinary PEFT adapter and its card; names of classes go into ``label_names.json`` beside it."""
        self._save(folder, None)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Push what `save` writes, see `meta_peft.push`; returns the address of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, repo_id)
            return hub.push(folder, repo_id, private=private, token=token)

    def _save(self, folder: str | Path, repo_id: str | None) -> None:
        names = self.label_names
        of_base = self.base_name, self.objective
        card = adapted_card(*of_base, self.metrics, repo_id, num_labels=self.num_labels, label_names=names)
        hub.save_adapted(self.weights, self.config, self.base_name, folder, label_names=names, card=card)


class Support(NamedTuple):
    """A task's encoded rows: those to adapt on, and those held back to tell when to stop."""

    rows: list[dict[str, Any]]
    held_back: list[dict[str, Any]]
    label_names: tuple[str, ...]


def encoded_support(
    learned: hub.MetaLearned, name: str, rows: Sequence[Mapping[str, Any]], hold_back: float = 0.0
) -> Support:
    """The rows of one task as the adapter's model reads them.

    Args:
        rows: of a known form, as `rows_of_task` gives them.
        hold_back: the share of rows to hold back, rounded, one at least if it is above 0; or, as a whole number, how
            many. They are drawn at random, by a fixed seed.

    Raises:
        MetaPeftError: there are no rows, or too few to hold any back; or one cannot be read.
    """
    if not rows:
        raise MetaPeftError(f"Task {name!r} has no support rows.")
    n_held = max(1, round(hold_back * len(rows))) if 0 < hold_back < 1 else int(hold_back)
    if n_held >= len(rows):
        raise MetaPeftError(
            f"Task {name!r} has {len(rows)} support rows, and hold_back={hold_back:g} leaves none of them to adapt on:"
            " give it more rows, or hold back less."
        )
    _check_columns(name, rows)
    of_task = learned.encoding.of_task(rows)
    encoded = [of_task(row) for row in rows]
    held = set(np.random.default_rng(0).permutation(len(rows))[:n_held].tolist())
    kept = [row for i, row in enumerate(encoded) if i not in held]
    return Support(kept, [row for i, row in enumerate(encoded) if i in held], of_task.facts.label_names)


def _check_columns(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless each row has the columns of a known form."""
    for number, row in enumerate(rows, start=1):
        try:
            example_columns(row.keys())
        except MetaPeftError as error:
            form = () if number == 1 else example_columns(rows[0].keys())
            missing = [repr(column) for column in form if column not in row]
            if len(missing) == len(form):  # there is nothing of it, so that it may be meant to be of another one
                raise MetaPeftError(f"Row {number} of task {name!r} cannot be read. {error}") from error
            raise MetaPeftError(
                f"Row {number} of task {name!r} has no column {listed(missing)}, which row 1 has: its columns are"
                f" {shown(sorted(row))}."
            ) from error


def check_hold_back(hold_back: float) -> None:
    if not is_number(hold_back) or hold_back < 0 or (hold_back >= 1 and not isinstance(hold_back, int)):
        raise MetaPeftError(
            f"hold_back must be a share of the support rows, 0 or more and below 1, or a whole number of them; got"
            f" {hold_back!r}."
        )


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller runs in: a server runs in neither
def adapted_stacks(
    model: PeftModel,
    supports: Mapping[str, Support],
    *,
    steps: int | None,
    tasks_per_forward: int,
    failed: dict[str, str] | None = None,
) -> Iterator[dict[str, Adapted]]:
    """Results by task name, as soon as a stack is done; which adapter is active makes no difference.

    Args:
        model: carries a meta-learned adapter, which is left unchanged.
        steps: gradient steps, the most of them where rows are held back; None for as many as in meta-training.
        tasks_per_forward: how many tasks with equally many rows go through the model at once. Where memory runs out,
            fewer are tried.
        failed: gets the reason of each task that does not fit by itself; without it, the first one is an error.
    """
    learned = hub.meta_learned(model)
    steps = learned.sidecar.inner.steps if steps is None else steps
    steps = whole("steps", steps, 0, MOST)
    tasks_per_forward = whole("tasks_per_forward", tasks_per_forward, 1, MOST)
    loss_fn = AdapterLoss(model, second_order=False, adapter=learned.adapter)
    with loss_fn.dense_copies_where_room():
        for names in _stacks(supports, tasks_per_forward):
            yield _adapt_what_fits(loss_fn, learned, {name: supports[name] for name in names}, steps, failed)


def _stacks(supports: Mapping[str, Support], size: int) -> list[list[str]]:
    """Names of tasks that can be stacked: equally many rows, of about the same length."""
    by_rows: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in sorted(supports, key=lambda name: max(map(row_length, supports[name].rows))):
        by_rows[len(supports[name].rows), len(supports[name].held_back)].append(name)
    return [names[i : i + size] for names in by_rows.values() for i in range(0, len(names), size)]


def _adapt_what_fits(
    loss_fn: AdapterLoss,
    learned: hub.MetaLearned,
    tasks: dict[str, Support],
    steps: int,
    failed: dict[str, str] | None,
) -> dict[str, Adapted]:
    """All tasks at once, or half of them and the other half, where memory runs out."""
    found = or_out_of_memory(partial(_adapt_stack, loss_fn, learned, tasks, steps))
    if not isinstance(found, BaseException):
        return found
    if len(tasks) == 1:
        (name,) = tasks
        said = f"Memory ran out on task {name!r} alone: give it fewer or shorter rows, or quantise the base."
        if failed is None:
            raise MetaPeftError(said) from found
        failed[name] = said
        return {}
    items, half = list(tasks.items()), len(tasks) // 2
    logger.warning("Memory ran out with %d tasks at once; going on with %d of them.", len(tasks), half)
    halves = (dict(items[:half]), dict(items[half:]))
    parts = [_adapt_what_fits(loss_fn, learned, part, steps, failed) for part in halves]
    return {name: result for part in parts for name, result in part.items()}


def _adapt_stack(
    loss_fn: AdapterLoss, learned: hub.MetaLearned, tasks: dict[str, Support], steps: int
) -> dict[str, Adapted]:
    sidecar = learned.sidecar
    own: Params = dict(loss_fn.weights.parameters())
    device = next(iter(own.values())).device
    collate = learned.encoding.collator()
    rows = collate.rows([support.rows for support in tasks.values()]).to(device)
    held = [support.held_back for support in tasks.values()]
    best = _Best(loss_fn, collate.rows(held).to(device)) if held[0] else None
    hyper = scaled({RATES: sidecar.log_rates.to(device)}, sidecar.rate_factor(steps))
    before: list[Tensor] = []

    def look(step: int, fast: Params) -> None:
        if step == 0:
            before.append(loss_fn.scores(fast, rows).loss_T)
        if best is not None:
            best.see(step, fast)

    fast = inner_loop.adapt(loss_fn, own, hyper, rows, sidecar.inner, steps=steps, after_step=look)
    fast = fast if best is None else best.weights
    after = loss_fn.scores(fast, rows)
    results = {}
    for i, (name, support) in enumerate(tasks.items()):
        metrics = {
            "steps": steps,
            "support_loss_before": float(before[0][i]),
            "support_loss_after": float(after.loss_T[i]),
            "support_exact_match_after": float(after.exact_match_T[i]),
        }
        if best is not None:
            metrics |= best.metrics(i)
        config = loss_fn.model.peft_config[learned.adapter]
        of_base = sidecar.base.name, sidecar.objective, sidecar.facts.num_labels
        results[name] = Adapted(take_task(fast, i), metrics, config, *of_base, support.label_names)
    return results


@dataclass
class _Best:
    """The weights of each task after the number of steps at which the loss of its held-back rows was the lowest."""

    loss_fn: AdapterLoss
    rows: Rows
    weights: Params = field(default_factory=dict)
    steps_T: Tensor = field(default_factory=lambda: torch.empty(0))
    first_T: Tensor = field(default_factory=lambda: torch.empty(0))
    loss_T: Tensor = field(default_factory=lambda: torch.empty(0))

    def see(self, step: int, fast: Params) -> None:
        loss_T = self.loss_fn.scores(fast, self.rows).loss_T
        if step == 0:
            self.weights = {name: w.clone() for name, w in fast.items()}
            self.first_T = self.loss_T = loss_T.nan_to_num(math.inf)
            self.steps_T = torch.zeros_like(loss_T)
            return
        better_T = loss_T < self.loss_T  # never where it is no number
        kept = self.weights.items()
        self.weights = {name: torch.where(per_task(better_T, w).bool(), fast[name], w) for name, w in kept}
        self.loss_T = torch.where(better_T, loss_T, self.loss_T)
        self.steps_T = torch.where(better_T, torch.full_like(loss_T, step), self.steps_T)

    def metrics(self, i: int) -> dict[str, float]:
        """Of task i."""
        losses = {"held_back_loss_before": float(self.first_T[i]), "held_back_loss_after": float(self.loss_T[i])}
        return {"steps": int(self.steps_T[i]), **losses}
