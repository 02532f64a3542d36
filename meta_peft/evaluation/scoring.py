"""How well the query rows of each task are answered, as one number of a named metric.

A `Scorer` is made once for a metric and a model. Given a batch it prepares what the batch's rows allow to prepare, and
returns a function of the adapter alone, which evaluation calls after every number of adaptation steps that it reports.
How the answers come about follows from the metric and from the kind of model (see `scorer_for`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.metrics import CONFIDENCES, METRICS, TEXTS, Metric, default_metric, metric_named
from meta_peft.evaluation.predictions import Tokens, choice_scores, references, with_choices, written
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.objectives import CLASSIFYING
from meta_peft.objectives.labelled_tokens import IGNORED, TaskScores
from meta_peft.types import EpisodeBatch, Params, Rows

logger = logging.getLogger("meta_peft")
CHOICE_SCORES = ("sum", "mean")


class Scores(NamedTuple):
    """Per task: the loss and the metric's value, ``[T]`` each, and counts for calibration, ``[T, K, 3]``.

    The latter are those of `TaskScores`: of single labels, whatever the metric.
    """

    loss: np.ndarray
    score: np.ndarray
    calibration: np.ndarray


Scored = Callable[[Params], Scores]


class Scorer(Protocol):
    """From a batch to a function from an adapter to the scores of the batch's query rows."""

    @property
    def metric(self) -> Metric: ...

    @property
    def loss_fn(self) -> AdapterLoss: ...

    def __call__(self, batch: EpisodeBatch) -> Scored: ...


@dataclass(frozen=True)
class Matched:
    """Exact match without writing anything: a row matches if each label is the most likely token given those before it.

    That is so exactly if greedy decoding writes the labels; it takes the one forward that gives the loss.
    """

    loss_fn: AdapterLoss
    metric: Metric = METRICS["exact_match"]

    def __call__(self, batch: EpisodeBatch) -> Scored:
        def score(adapter: Params) -> Scores:
            return _scores(self.loss_fn.scores(adapter, batch.query))

        return score


@dataclass(frozen=True)
class Written:
    """A metric of texts, on what greedy decoding writes.

    Args:
        tokenizer: turns tokens to text; special tokens are left out.
        stop: tokens that end an answer.
        max_new_tokens: see `predictions.written`.
    """

    loss_fn: AdapterLoss
    metric: Metric
    tokenizer: Any
    stop: tuple[int, ...]
    max_new_tokens: int | None = None

    def __call__(self, batch: EpisodeBatch) -> Scored:
        rows = batch.query
        right = _texts(self.tokenizer, references(rows))

        def score(adapter: Params) -> Scores:
            answers = written(self.loss_fn, adapter, rows, stop=self.stop, max_new_tokens=self.max_new_tokens)
            found = _texts(self.tokenizer, answers)
            of_labels = self.loss_fn.scores(adapter, rows)
            return _scores(of_labels, _per_task(self.metric, found, right, rows.n_tasks))

        return score


@dataclass(frozen=True)
class Chosen:
    """A metric of classes, on the likeliest of each row's choices.

    The choices are those of the row, or else the distinct answers of the task's rows in the episode, its label words.
    So a model is judged by which of them it prefers, and not punished for what else it might have written.

    Args:
        mean: rank choices by the mean log-likelihood of their tokens instead of the sum.
    """

    loss_fn: AdapterLoss
    metric: Metric
    mean: bool = False

    def __call__(self, batch: EpisodeBatch) -> Scored:
        rows, loss_fn = batch.query, self.loss_fn
        answers_of = _filled_in if loss_fn.objective == "masked_lm" else references
        choices = _choices(batch, answers_of)
        right_B = np.array([c.index(answer) for c, answer in zip(choices, answers_of(rows), strict=True)])
        each = with_choices(rows, choices, causal=loss_fn.causal)
        missing_BC = torch.tensor([[c >= len(answers) for c in range(len(each))] for answers in choices])

        def score(adapter: Params) -> Scores:
            scores_BC = choice_scores(loss_fn, adapter, each, mean=self.mean).cpu().double()
            p_BC = scores_BC.masked_fill(missing_BC, -torch.inf).softmax(1)
            found_B = p_BC.argmax(1).numpy()
            if self.metric.of == CONFIDENCES:
                found: Sequence[Any] = p_BC.amax(1).tolist()
                right: Sequence[Any] = (found_B == right_B).tolist()
            else:
                found, right = found_B.tolist(), right_B.tolist()
            of_labels = loss_fn.scores(adapter, rows)
            return _scores(of_labels, _per_task(self.metric, found, right, rows.n_tasks))

        return score


@dataclass(frozen=True)
class Predicted:
    """A metric on the most likely label at each labelled position: classes of a head, or tokens of masked positions.

    Args:
        tokenizer: turns the tokens of a row to text, for a metric of texts.
    """

    loss_fn: AdapterLoss
    metric: Metric
    tokenizer: Any = None

    def __call__(self, batch: EpisodeBatch) -> Scored:
        rows = batch.query
        labelled_BL = rows.labels_BL != IGNORED

        def score(adapter: Params) -> Scores:
            of_labels = self.loss_fn.scores(adapter, rows)
            found_BL, right_BL = of_labels.predicted_BL, rows.labels_BL
            if self.metric.of == TEXTS:
                found, right = (_texts(self.tokenizer, _labelled(t)) for t in (found_BL, right_BL))
                return _scores(of_labels, _per_task(self.metric, found, right, rows.n_tasks))
            if self.metric.of == CONFIDENCES:
                found_BL, right_BL = of_labels.confidence_BL, (found_BL == right_BL).long()
            size = len(labelled_BL) // rows.n_tasks
            parts = [(slice(i, i + size), labelled_BL[i : i + size]) for i in range(0, len(labelled_BL), size)]
            values = [self.metric(found_BL[p][there].tolist(), right_BL[p][there].tolist()) for p, there in parts]
            return _scores(of_labels, np.array(values))

        return score


def scorer_for(
    name: str | None,
    loss_fn: AdapterLoss,
    tokenizer: Any,
    *,
    max_new_tokens: int | None = None,
    choice_score: str = "sum",
) -> Scorer:
    """What scores by the metric called `name`, or by the default of the model's objective.

    Exact match is found by teacher forcing. Other metrics of texts judge what greedy decoding writes; a masked language
    model fills its masks. Metrics of classes, and calibration, judge which answer is likeliest among a row's choices or
    its task's label words. A classification head predicts its most likely class.

    Args:
        max_new_tokens: where a written answer is cut.
        choice_score: ``sum`` or ``mean``, of the log-likelihoods of a choice's tokens.

    Raises:
        MetaPeftError: the metric is unknown, not installed, or asks for what the model cannot give.
    """
    metric = metric_named(name or default_metric(loss_fn.objective))
    if loss_fn.objective in CLASSIFYING:
        if metric.of == TEXTS:
            raise MetaPeftError(
                f"{metric.name} compares texts, but {loss_fn.objective} predicts classes: take accuracy, macro_f1 or ece."
            )
        return Predicted(loss_fn, metric)
    if metric.of != TEXTS:
        return Chosen(loss_fn, metric, choice_score == "mean")
    if metric.name == "exact_match":
        return Matched(loss_fn)
    if loss_fn.objective == "masked_lm":
        return Predicted(loss_fn, metric, tokenizer)
    return Written(loss_fn, metric, tokenizer, _ends(loss_fn, tokenizer), max_new_tokens)


def _ends(loss_fn: AdapterLoss, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's end of sequence, which ends completions, and what else the model ends with."""
    config = getattr(loss_fn.model.get_base_model(), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _choices(batch: EpisodeBatch, answers_of: Callable[[Rows], list[Tokens]]) -> list[list[Tokens]]:
    """The answers that each query row chooses from, ``[B]``."""
    own: list[list[Tokens]] = [[] for _ in batch.query.labels_BL]
    if batch.query.choices_BCL is not None:
        for answers, choices_CL in zip(own, batch.query.choices_BCL, strict=True):
            answers += [tokens for row in choices_CL if (tokens := row[row != IGNORED].tolist())]
    words: list[list[Tokens]] = []
    for t, task in enumerate(batch.tasks):
        of_task = (answers_of(rows.tasks(t, t + 1)) for rows in (batch.support, batch.query))
        distinct = dict.fromkeys(tuple(answer) for answers in of_task for answer in answers)
        words.append([list(word) for word in distinct])
        if len(distinct) == 1 and batch.query.choices_BCL is None:
            logger.warning("The rows of task %r all have the same answer, so there is nothing to choose from.", task)
    per_task = len(own) // batch.n_tasks
    return [answers or words[i // per_task] for i, answers in enumerate(own)]


def _filled_in(rows: Rows) -> list[Tokens]:
    return _labelled(rows.labels_BL)


def _labelled(labels_BL: Tensor) -> list[Tokens]:
    """All labels of each row, ``[B]``."""
    return [labels_L[labels_L != IGNORED].tolist() for labels_L in labels_BL]


def _texts(tokenizer: Any, answers: Sequence[Tokens]) -> list[str]:
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def _scores(found: TaskScores, by_metric: np.ndarray | None = None) -> Scores:
    """Loss and calibration beside the metric's values; exact match by default."""
    score = _numbers(found.exact_match_T) if by_metric is None else by_metric
    return Scores(_numbers(found.loss_T), score, _numbers(found.calibration_TK3))


def _numbers(values_T: Tensor) -> np.ndarray:
    return values_T.double().cpu().numpy()


def _per_task(metric: Metric, found: Sequence[Any], right: Sequence[Any], n_tasks: int) -> np.ndarray:
    size = len(right) // n_tasks
    parts = [slice(i, i + size) for i in range(0, len(right), size)]
    return np.array([metric(found[part], right[part]) for part in parts])
