"""In-context examples, what one does without any training: the support rows in front of each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.scoring import Scorer, Scores, Written
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks import EpisodeCollator
from meta_peft.types import Episode, EpisodeBatch, Params


def in_context_scores(
    scorer: Scorer, adapter: Params, episodes: Sequence[Episode], collate: EpisodeCollator, tokenizer: Any
) -> Scores:
    """The scores of each task with its support rows in the prompt.

    Rows end with a newline in place of the end-of-sequence token, which a base model would take for the end of
    everything. An exact match is greedy decoding up to and with that newline, and answers that are written end there.
    What all rows of a task begin with, its examples, is read once, unless answers are to be written.

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
    whole = isinstance(scorer, Written) or not scorer.loss_fn.reads_on  # `generate` begins with no keys and values
    device = next(iter(adapter.values())).device
    found = []
    for episode in (ended(episode, newline) for episode in episodes):
        query = behind_examples(episode)
        shared = 0 if whole else _in_common(query)
        rows = collate.rows([[_from(shared, row) for row in query]])
        batch = EpisodeBatch(collate.rows([episode.support]), rows, [episode.task]).to(device)
        with scorer.loss_fn.behind(query[0]["input_ids"][:shared], adapter):
            found.append(scorer(batch)(adapter))
    return Scores(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def ended(episode: Episode, newline: list[int]) -> Episode:
    """The episode with newlines for the tokens that end its rows' answers."""
    support, query = ([_ended(row, newline) for row in rows] for rows in (episode.support, episode.query))
    return replace(episode, support=support, query=query)


def behind_examples(episode: Episode) -> list[dict[str, Any]]:
    """The query rows, each behind all support rows; the first token of a row (see `PromptFormat`) stands once."""
    examples = [token for row in episode.support for token in row["input_ids"][1:]]
    rows = []
    for row in episode.query:
        ids, labels = row["input_ids"], row["labels"]
        before = [ids[0], *examples]
        rows.append({**row, "input_ids": [*before, *ids[1:]], "labels": [IGNORED] * len(before) + labels[1:]})
    return rows


def _in_common(rows: list[dict[str, Any]]) -> int:
    """How many tokens all rows begin with; each keeps a token of its own in front of its first label."""
    prompts = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) - 1 for row in rows]
    columns = zip(*(row["input_ids"][:n] for row, n in zip(rows, prompts, strict=True)), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def _from(start: int, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "input_ids": row["input_ids"][start:], "labels": row["labels"][start:]}


def _ended(row: dict[str, Any], newline: list[int]) -> dict[str, Any]:
    changed = {name: [*row[name][:-1], *newline] for name in ("input_ids", "labels")}
    if row.get("choices"):
        changed["choices"] = [[*answer[:-1], *newline] for answer in row["choices"]]
    return changed
