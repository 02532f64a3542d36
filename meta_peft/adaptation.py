"""What a user calls: support examples in, adapted PEFT adapters out."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from meta_peft import hub, inner_loop
from meta_peft.adapter_loss import AdapterLoss
from meta_peft.errors import MetaPeftError
from meta_peft.fast_weights import FastWeights
from meta_peft.inner_optimizers.rule import RATES, scaled
from meta_peft.memory import or_out_of_memory
from meta_peft.params import take_task
from meta_peft.tasks.collate import row_length
from meta_peft.types import Params

logger = logging.getLogger("meta_peft")

Examples = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Adapted:
    """One task's adapted weights, and its support loss ``before`` and ``after`` adaptation.

    `label_names` are the names of the classes, by number, of a task whose labels have names.
    """

    weights: Params
    metrics: dict[str, float]
    config: Any
    base_name: str
    label_names: tuple[str, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Write an ordinary PEFT adapter; names of classes go into ``label_names.json`` beside it."""
        hub.save_adapted(self.weights, self.config, self.base_name, folder, label_names=self.label_names)


def adapt(
    model: PeftModel, support: Examples, *, steps: int | None = None, name: str = "adapted"
) -> tuple[PeftModel, dict[str, float]]:
    """Adapt to one task: `model` with a new active adapter called `name`, and the metrics of `Adapted`.

    The meta-learned adapter stays as it is, so the next call starts from it again; a `name` used before is overwritten.

    Args:
        model: from `meta_peft.load`, or trained by `MetaTrainer`.
        support: a handful of rows, in any form that the model's objective reads.
        steps: gradient steps; by default as many as in meta-training.
        name: of the new adapter.

    Raises:
        MetaPeftError: the model carries no meta-learned adapter, or a row cannot be read.
    """
    learned = hub.meta_learned(model)
    if name in ("", learned.adapter) or "." in name:
        raise MetaPeftError(f"name={name!r} is empty, taken by the meta-learned adapter or has a dot: choose another.")
    result = adapt_many(model, {name: support}, steps=steps)[name]
    if name not in model.peft_config:
        model.add_adapter(name, copy.deepcopy(result.config))  # PEFT changes its list of heads
    FastWeights(model, name).load_(result.weights)
    model.set_adapter(name)
    return model, result.metrics


def adapt_many(
    model: PeftModel,
    tasks: Mapping[str, Examples],
    *,
    steps: int | None = None,
    tasks_per_forward: int = 8,
    progress: Callable[[int], object] = lambda tasks: None,
) -> dict[str, Adapted]:
    """Adapt to many tasks, several in each forward of the base model.

    Args:
        model: from `meta_peft.load`, or trained by `MetaTrainer`; it is left unchanged.
        tasks: support rows by task name.
        steps: gradient steps; by default as many as in meta-training.
        tasks_per_forward: how many tasks with equally many rows go through the model at once. Where memory runs out,
            fewer are tried.
        progress: called with the number of tasks just finished.
    """
    learned = hub.meta_learned(model)
    sidecar, encoding = learned.sidecar, learned.encoding
    steps = sidecar.inner.steps if steps is None else steps
    if steps < 0:
        raise MetaPeftError(f"steps must be 0 or more, got {steps}.")
    encoded: dict[str, list[dict[str, Any]]] = {}
    label_names: dict[str, tuple[str, ...]] = {}
    for name, support in tasks.items():
        rows = list(support)
        if not rows:
            raise MetaPeftError(f"Task {name!r} has no support rows.")
        of_task = encoding.of_task(rows)
        encoded[name], label_names[name] = [of_task(row) for row in rows], of_task.facts.label_names

    active = list(model.active_adapters)
    model.set_adapter(learned.adapter)
    try:
        loss_fn = AdapterLoss(model, second_order=False)
        results: dict[str, Adapted] = {}
        for names in _stacks(encoded, tasks_per_forward):
            results.update(_adapt_what_fits(loss_fn, learned, {name: encoded[name] for name in names}, steps))
            progress(len(names))
    finally:
        model.set_adapter(active[0] if len(active) == 1 else active)
    return {name: replace(results[name], label_names=label_names[name]) for name in tasks}


def _stacks(encoded: Mapping[str, list[Any]], size: int) -> list[list[str]]:
    """Names of tasks that can be stacked: equally many rows, of about the same length."""
    by_rows: dict[int, list[str]] = defaultdict(list)
    for name in sorted(encoded, key=lambda name: max(map(row_length, encoded[name]))):
        by_rows[len(encoded[name])].append(name)
    return [names[i : i + size] for names in by_rows.values() for i in range(0, len(names), size)]


def _adapt_what_fits(
    loss_fn: AdapterLoss, learned: hub.MetaLearned, tasks: dict[str, list[dict[str, Any]]], steps: int
) -> dict[str, Adapted]:
    """All tasks at once, or half of them and the other half, where memory runs out."""
    found = or_out_of_memory(partial(_adapt_stack, loss_fn, learned, tasks, steps))
    if not isinstance(found, BaseException):
        return found
    if len(tasks) == 1:
        raise MetaPeftError(
            f"Memory ran out on task {next(iter(tasks))!r} alone: give it fewer or shorter rows, or quantise the base."
        ) from found
    items, half = list(tasks.items()), len(tasks) // 2
    logger.warning("Memory ran out with %d tasks at once; going on with %d of them.", len(tasks), half)
    halves = (dict(items[:half]), dict(items[half:]))
    return {name: result for part in halves for name, result in _adapt_what_fits(loss_fn, learned, part, steps).items()}


def _adapt_stack(
    loss_fn: AdapterLoss, learned: hub.MetaLearned, tasks: dict[str, list[dict[str, Any]]], steps: int
) -> dict[str, Adapted]:
    sidecar, model = learned.sidecar, loss_fn.model
    own: Params = dict(loss_fn.weights.parameters())
    device = next(iter(own.values())).device
    rows = learned.encoding.collator().rows(list(tasks.values())).to(device)
    hyper = scaled({RATES: sidecar.log_rates.to(device)}, sidecar.rate_factor(steps))
    before: list[Tensor] = []

    def score_first(step: int, fast: Params) -> None:
        if step == 0:
            before.append(loss_fn.scores(fast, rows).loss_T)

    fast = inner_loop.adapt(loss_fn, own, hyper, rows, sidecar.inner, steps=steps, after_step=score_first)
    after = loss_fn.scores(fast, rows)
    return {
        name: Adapted(
            take_task(fast, i),
            {
                "steps": steps,
                "support_loss_before": float(before[0][i]),
                "support_loss_after": float(after.loss_T[i]),
                "support_exact_match_after": float(after.exact_match_T[i]),
            },
            model.peft_config[learned.adapter],
            sidecar.base.name,
        )
        for i, name in enumerate(tasks)
    }
