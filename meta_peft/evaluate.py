"""Adaptation curves on held-out tasks: how good is each start after 0, 1, 3, 10, ... steps on a few examples?

Every start is judged by the same rule on the same episodes, and for every number of steps each has an adaptation rate
of its own, chosen on validation tasks from the same number of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.inner_loop import adapt
from meta_peft.inner_optimizers.rule import InnerRule, scaled
from meta_peft.objectives.labelled_tokens import TaskScores
from meta_peft.types import EpisodeBatch, Params

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Start:
    """An adapter to adapt from, and the rule and rates to adapt it by."""

    name: str
    adapter: Params
    hyper: Params
    rule: InnerRule


@dataclass(frozen=True)
class Curve:
    """Scores ``[T, S]`` of T tasks after each of S numbers of steps; `factors` are the rate factors used, ``[S]``,
    None where there were several."""

    steps: tuple[int, ...]
    loss: np.ndarray
    exact_match: np.ndarray
    factors: tuple[float | None, ...]


def curve(
    loss_fn: AdapterLoss,
    start: Start,
    batches: Sequence[EpisodeBatch],
    steps: Sequence[int],
    *,
    factor: float = 1.0,
    progress: Progress = lambda tasks: None,
) -> Curve:
    """Query loss and exact match of each task, adapted from `start` with its rates times `factor`."""
    rows: list[np.ndarray] = []
    hyper = scaled(start.hyper, factor)
    for batch in batches:
        scores: dict[int, TaskScores] = {}

        def score(step: int, fast: Params, batch: EpisodeBatch = batch, scores: dict[int, TaskScores] = scores) -> None:
            if step in steps:
                scores[step] = loss_fn.scores(fast, batch.query)

        adapt(loss_fn, start.adapter, hyper, batch.support, start.rule, steps=max(steps), after_step=score)
        rows.append(
            torch.stack([torch.stack([s.loss_T, s.exact_match_T]) for _, s in sorted(scores.items())]).cpu().numpy()
        )
        progress(batch.n_tasks)
    loss, match = np.concatenate(rows, axis=2).transpose(1, 2, 0)  # [2, T, S]
    return Curve(tuple(sorted(steps)), loss, match, (factor,) * len(steps))


def tune(
    loss_fn: AdapterLoss,
    start: Start,
    batches: Sequence[EpisodeBatch],
    steps: Sequence[int],
    factors: Sequence[float],
    *,
    progress: Progress = lambda tasks: None,
) -> dict[int, float]:
    """For each number of steps, the rate factor with the lowest mean query loss on the validation `batches`."""
    tried = [curve(loss_fn, start, batches, steps, factor=f, progress=progress) for f in factors]
    mean_loss = np.stack([np.where(np.isfinite(c.loss), c.loss, np.inf).mean(0) for c in tried])  # [F, S]
    return {step: factors[int(best)] for step, best in zip(sorted(steps), mean_loss.argmin(0), strict=True)}


def tuned_curve(
    loss_fn: AdapterLoss,
    start: Start,
    batches: Sequence[EpisodeBatch],
    factors: dict[int, float],
    *,
    progress: Progress = lambda tasks: None,
) -> Curve:
    """The curve of `start` with, for each number of steps, the factor that `tune` chose for it."""
    steps = sorted(factors)
    parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for factor in sorted(set(factors.values())):
        mine = [step for step in steps if factors[step] == factor]
        run = curve(loss_fn, start, batches, mine, factor=factor, progress=progress)
        parts.update({step: (run.loss[:, i], run.exact_match[:, i]) for i, step in enumerate(mine)})
    loss, match = (np.stack([parts[step][k] for step in steps], axis=1) for k in (0, 1))
    return Curve(tuple(steps), loss, match, tuple(factors[step] for step in steps))


def interval(values: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over tasks (percentile method); `values` is ``[T]``."""
    draws = np.random.default_rng(seed).choice(values, (resamples, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
