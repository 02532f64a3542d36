"""In-context examples, what one does without any training: the support rows in front of each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.scoring import Scorer, Scores, Written
from meta_peft.tasks import EpisodeCollator
from meta_peft.types import Episode, EpisodeBatch, Params


def in_context_scores(
    scorer: Scorer, adapter: Params, episodes: Sequence[Episode], collate: EpisodeCollator, tokenizer: Any
) -> Scores:
    """The scores of each task with its support rows in the prompt.

    Rows end with a newline in place of the end-of-sequence token, which a base model would take for the end of
    everything. An exact match is greedy decoding up to and with that newline, and answers that are written end there.

    Raises:
        MetaPeftError: the model does not write on where a row ends, or its tokenizer has no newline.
    """
    if not scorer.loss_fn.causal:
        raise MetaPeftError(
            f"In-context examples need a causal language model; this one is trained as {scorer.loss_fn.objective}."
        )
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not newline:
        raise MetaPeftError("The tokenizer has no newline, which separates in-context examples.")
    if isinstance(scorer, Written):
        scorer = replace(scorer, stop=(*scorer.stop, newline[-1]))
    device = next(iter(adapter.values())).device
    found = []
    for episode in episodes:
        query = collate.rows([[_with_examples(episode, row, newline) for row in episode.query]])
        support = collate.rows([[_ended(row, newline) for row in episode.support]])
        found.append(scorer(EpisodeBatch(support, query, [episode.task]).to(device))(adapter))
    return Scores(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _ended(row: dict[str, Any], newline: list[int]) -> dict[str, Any]:
    """The row with newlines for the tokens that end its answers."""
    changed = {name: [*row[name][:-1], *newline] for name in ("input_ids", "labels")}
    if row.get("choices"):
        changed["choices"] = [[*answer[:-1], *newline] for answer in row["choices"]]
    return changed


def _with_examples(episode: Episode, row: dict[str, Any], newline: list[int]) -> dict[str, Any]:
    """A query row behind all support rows; the first token of a row (see `PromptFormat`) stands once."""
    row = _ended(row, newline)
    examples = [token for other in episode.support for token in _ended(other, newline)["input_ids"][1:]]
    ids, labels = row["input_ids"], row["labels"]
    before = [ids[0], *examples]
    return {**row, "input_ids": [*before, *ids[1:]], "labels": [IGNORED] * len(before) + labels[1:]}
