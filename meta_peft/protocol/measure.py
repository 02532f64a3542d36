"""One cell: choose the rates of its start, and run its curves."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from meta_peft.comparison.compare import by_all_rules, held_out_episodes, start_curve
from meta_peft.evaluation.evaluate import Curve, Start, curve
from meta_peft.evaluation.in_context import in_context_scores
from meta_peft.evaluation.scoring import Scores
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.protocol.arguments import IN_CONTEXT
from meta_peft.protocol.cells import PROTOCOL, Cell, Found, MeasuredWith
from meta_peft.protocol.setting import Setting
from meta_peft.protocol.starts import trained
from meta_peft.run_tasks.run_episodes import RunEpisodes
from meta_peft.tasks.collate import row_length
from meta_peft.training.trainer import MetaTrainer
from meta_peft.types import Episode


def measured(cell: Cell, setting: Setting, now: MeasuredWith) -> Found:
    """What is found in a cell. Its adapter, if it is trained, is saved in the folder ``starts``: as it was when
    it was best for the number of steps that is compared."""
    trainer, stops, cost = trained(cell, setting)
    validation = held_out_episodes(trainer, setting.tasks["validation"], setting.comparison.max_validation_tasks)
    test = held_out_episodes(trainer, setting.tasks["test"], setting.comparison.max_test_tasks)
    more = {n: _with_shots(trainer, setting, test, n) for n in setting.shots_curve if n != trainer.args.shots}
    common: dict[str, Any] = {"cell": cell, "metric": trainer.scorer.metric.name, "tasks": [e.task for e in test]}
    common |= {"at": setting.at, "protocol": PROTOCOL}
    common |= {"options": now.options, "inputs": now.inputs, "base": now.base}
    common["query_rows"] = len(test[0].query)
    cost["support_tokens"] = float(np.mean([sum(map(row_length, e.support)) for e in test]))
    if cell.start == IN_CONTEXT:
        scores = _in_context(trainer, test)
        shots = {str(n): _values(_in_context(trainer, episodes)) for n, episodes in more.items()}
        rows = {"loss": scores.loss[:, None].tolist(), "score": scores.score[:, None].tolist()}
        counts = [scores.calibration.sum(0).tolist()]
        return Found(**common, **rows, steps=[0], factors=[None], calibration=counts, shots=shots, cost=cost)

    batches = trainer.batches(test)
    starts = by_all_rules(trainer, stops)
    factors = setting.comparison.rate_factors
    found = start_curve(trainer, starts, trainer.batches(validation), batches, setting.steps, factors)
    column = found.steps.index(setting.at)
    factor = found.factors[column]
    start = next(s for s in starts if s.how == found.how[column])
    assert factor is not None, "start_curve chooses one for each number of steps"
    if cell.trained:
        _save(trainer, next(stop for stop in stops if stop.adapter is start.adapter), found)
    shots = {str(n): _after(trainer, start, episodes, setting.at, factor) for n, episodes in more.items()}
    cost["seconds_per_step"] = _seconds_per_step(trainer.scorer.loss_fn, start, batches[0])
    return Found(
        **common,
        steps=list(found.steps),
        factors=list(found.factors),
        how=list(found.how),
        loss=found.loss.tolist(),
        score=found.score.tolist(),
        calibration=_counts(found),
        shots=shots,
        along_training=_finite(found.along_training),
        cost=cost,
    )


def _save(trainer: MetaTrainer, stop: Start, found: Curve) -> None:
    """Keep the adapter as it was at that point of its training, with the rate factors that were chosen for it.

    Those that were chosen for another point or another rule have no place in its files.
    """
    trainer.take(stop)
    chosen = zip(found.steps, found.factors, found.how, strict=True)
    trainer.record(rate_factors={k: f for k, f, how in chosen if f is not None and how == stop.how})
    trainer.save_model()


def _with_shots(trainer: MetaTrainer, setting: Setting, test: list[Episode], shots: int) -> list[Episode]:
    """The test episodes with another number of support rows, in the same order of tasks.

    Where these are fewer, they are the first ones of each, with the same query rows. Where they are more, or of several
    classes each, episodes are drawn anew.
    """
    if trainer.args.ways is None and shots < trainer.args.shots:
        return [replace(episode, support=episode.support[:shots]) for episode in test]
    args = copy.copy(trainer.args)
    args.shots = shots
    names = dict.fromkeys(episode.task for episode in test)
    episodes = RunEpisodes(trainer.loss_fn.model, trainer.encoding, args, sharded=False)
    return list(episodes.held_out(setting.tasks["test"].select(names)))


def _in_context(trainer: MetaTrainer, episodes: list[Episode]) -> Scores:
    own = {name: p.detach() for name, p in trainer.scorer.loss_fn.weights.parameters().items()}
    return in_context_scores(trainer.scorer, own, episodes, trainer.data_collator, trainer.processing_class)


def _after(trainer: MetaTrainer, start: Start, episodes: list[Episode], steps: int, factor: float) -> dict[str, Any]:
    loss_fn, batches = trainer.scorer.loss_fn, trainer.batches(episodes)
    found = curve(loss_fn, start, batches, (steps,), factor=factor, scorer=trainer.scorer)
    return {"loss": found.loss[:, 0].tolist(), "score": found.score[:, 0].tolist()}


def _finite(along: Mapping[float, tuple[float, ...]]) -> dict[str, list[float | None]]:
    return {f"{part:g}": [loss if np.isfinite(loss) else None for loss in losses] for part, losses in along.items()}


def _values(scores: Scores) -> dict[str, list[float]]:
    return {"loss": scores.loss.tolist(), "score": scores.score.tolist()}


def _counts(found: Curve) -> list[Any]:
    assert found.calibration is not None, "a curve that was just run has it"
    counts: list[Any] = found.calibration.tolist()
    return counts


def _seconds_per_step(loss_fn: AdapterLoss, start: Start, batch: Any, steps: int = 3) -> float:
    """Of one task, in a stack of several."""
    began = time.monotonic()
    adapt(loss_fn, start.adapter, start.hyper, batch.support, start.rule, steps=steps)
    return (time.monotonic() - began) / steps / batch.n_tasks
