"""Adaptation curves on held-out tasks: how good is each start after 0, 1, 3, 10, ... steps on a few examples?

Every start is judged by the same rule on the same episodes, and for every number of steps each has an adaptation rate
of its own, chosen on validation tasks from the same number of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meta_peft.evaluation.scoring import Matched, Scored, Scorer, Scores
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.slow_prefix import held_below
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers.rule import InnerRule, scaled
from meta_peft.types import EpisodeBatch, Params

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Start:
    """An adapter to adapt from, and the rule and rates to adapt it by; `how` tells it from others of its name, in words.

    `part` is the part of its training after which it was like this.
    """

    name: str
    adapter: Params
    hyper: Params
    rule: InnerRule
    how: str = ""
    part: float = 1.0


@dataclass(frozen=True)
class Curve:
    """Query loss, and score by the metric called `metric`, ``[T, S]`` each, of T tasks after each of S numbers of steps.

    `factors` are the rate factors used, ``[S]``, None where there were several. `calibration` has the counts of
    `labelled_tokens.TaskScores` summed over tasks, ``[S, K, 3]``, where they were kept. `how` is that of the
    start that was adapted, ``[S]``, where there are several of one name. `along_training` has, for each part of its
    training that was tried, the lowest mean query loss on the validation tasks, ``[S]``.
    """

    steps: tuple[int, ...]
    loss: np.ndarray
    score: np.ndarray
    factors: tuple[float | None, ...]
    metric: str = "exact_match"
    calibration: np.ndarray | None = None
    how: tuple[str, ...] = ()
    along_training: Mapping[float, tuple[float, ...]] = field(default_factory=dict)


def curve(
    loss_fn: AdapterLoss,
    start: Start,
    batches: Sequence[EpisodeBatch],
    steps: Sequence[int],
    *,
    factor: float = 1.0,
    scorer: Scorer | None = None,
    progress: Progress = lambda tasks: None,
) -> Curve:
    """Query loss and score of each task, adapted from `start` with its rates times `factor`.

    Args:
        loss_fn: what is descended; one made with ``second_order=False`` takes the fastest attention.
        scorer: see `scoring.scorer_for`; by default exact match, which costs nothing beside the loss.
        progress: called with the number of tasks just finished.
    """
    parts: list[list[Scores]] = []
    hyper = scaled(start.hyper, factor)
    scorer = scorer or Matched(loss_fn)
    with loss_fn.dense_copies_where_room():
        for batch in batches:
            found: dict[int, Scores] = {}
            scored = scorer(batch)

            def look(step: int, fast: Params, found: dict[int, Scores] = found, scored: Scored = scored) -> None:
                if step in steps:
                    found[step] = scored(fast)

            with held_below(scorer.loss_fn, start.rule.fast_names(start.adapter), batch.query):
                adapt(loss_fn, start.adapter, hyper, batch.support, start.rule, steps=max(steps), after_step=look)
            parts.append([scores for _, scores in sorted(found.items())])
            progress(batch.n_tasks)
    by_step = [
        [np.concatenate(values) for values in zip(*of_step, strict=True)] for of_step in zip(*parts, strict=True)
    ]
    loss, score = (np.stack([values[i] for values in by_step], axis=1) for i in (0, 1))
    calibration = np.stack([counts.sum(0) for _, _, counts in by_step])
    how = (start.how,) * len(steps)
    return Curve(tuple(sorted(steps)), loss, score, (factor,) * len(steps), scorer.metric.name, calibration, how)


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
    mean_loss_FS = losses_by_factor(loss_fn, start, batches, steps, factors, progress=progress)
    return {step: factors[int(best)] for step, best in zip(sorted(steps), mean_loss_FS.argmin(0), strict=True)}


def losses_by_factor(
    loss_fn: AdapterLoss,
    start: Start,
    batches: Sequence[EpisodeBatch],
    steps: Sequence[int],
    factors: Sequence[float],
    *,
    progress: Progress = lambda tasks: None,
) -> np.ndarray:
    """Mean query losses ``[F, S]``, infinite where a task's is not finite."""
    tried = [curve(loss_fn, start, batches, steps, factor=f, progress=progress) for f in factors]
    return np.stack([np.where(np.isfinite(c.loss), c.loss, np.inf).mean(0) for c in tried])


def tuned_curve(
    loss_fn: AdapterLoss,
    start: Start,
    batches: Sequence[EpisodeBatch],
    factors: dict[int, float],
    *,
    scorer: Scorer | None = None,
    progress: Progress = lambda tasks: None,
) -> Curve:
    """The curve of `start` with, for each number of steps, the factor that `tune` chose for it."""
    scorer = scorer or Matched(loss_fn)
    return joined(
        [
            curve(
                loss_fn,
                start,
                batches,
                [step for step, of_it in factors.items() if of_it == factor],
                factor=factor,
                scorer=scorer,
                progress=progress,
            )
            for factor in sorted(set(factors.values()))
        ]
    )


def joined(curves: Sequence[Curve]) -> Curve:
    """Curves of the same tasks after different numbers of steps as one."""
    order = sorted((step, c, i) for c, found in enumerate(curves) for i, step in enumerate(found.steps))

    def column(name: str) -> list[Any]:
        return [getattr(curves[c], name)[..., i] for _, c, i in order]

    counts = [curves[c].calibration for _, c, _ in order]
    calibration = [of[i] for of, (_, _, i) in zip(counts, order, strict=True) if of is not None]
    return Curve(
        steps=tuple(step for step, _, _ in order),
        loss=np.stack(column("loss"), axis=1),
        score=np.stack(column("score"), axis=1),
        factors=tuple(curves[c].factors[i] for _, c, i in order),
        metric=curves[0].metric,
        calibration=np.stack(calibration) if len(calibration) == len(order) else None,
        how=tuple(curves[c].how[i] for _, c, i in order),
    )


def calibration_error(counts_K3: np.ndarray) -> float:
    """The expected calibration error: the mean gap between confidence and share right in bins of equal width.

    Guo et al. 2017, arXiv 1706.04599, equation 3; `counts_K3` as in `Curve.calibration`, of one number of steps.
    """
    n, confidence, right = counts_K3.T
    return float(np.abs(confidence - right).sum() / max(n.sum(), 1))
