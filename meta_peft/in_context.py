"""In-context examples, what one does without any training: the support rows in front of each query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks import EpisodeCollator
from meta_peft.tasks.prompt import answer_length
from meta_peft.types import Episode, Params


def in_context_scores(
    loss_fn: AdapterLoss, adapter: Params, episodes: Sequence[Episode], collate: EpisodeCollator, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Query loss and exact match of each task, ``[T]`` each, with its support rows in the prompt.

    Rows end with a newline in place of the end-of-sequence token, which a base model would take for the end of
    everything; a match is greedy decoding up to and with that newline.
    """
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not newline:
        raise MetaPeftError("The tokenizer has no newline, which separates in-context examples.")
    losses: list[float] = []
    matches: list[float] = []
    for episode in episodes:
        rows = collate.rows([[_with_examples(episode, j, newline) for j in range(len(episode.query))]])
        device = next(iter(adapter.values())).device
        scores = loss_fn.scores(adapter, rows.to(device))
        losses.append(_scalar(scores.loss_T))
        matches.append(_scalar(scores.exact_match_T))
    return np.array(losses), np.array(matches)


def _with_examples(episode: Episode, query: int, newline: list[int]) -> dict[str, list[int]]:
    """Query row `query` behind all support rows; the first token of a row (see `PromptFormat`) stands once."""
    first = episode.query[query]["input_ids"][:1]
    examples = [token for row in episode.support for token in [*row["input_ids"][1:-1], *newline]]
    row = episode.query[query]
    prompt = len(row["labels"]) - answer_length(row["labels"])
    ids = [*first, *examples, *row["input_ids"][1:-1], *newline]
    completion = [*row["labels"][prompt:-1], *newline]
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - len(completion)) + completion}


def _scalar(value: Tensor) -> float:
    return float(value.reshape(()))
