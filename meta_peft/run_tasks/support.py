"""Support rows chosen from a pool: for a user who may label only a few, and for the episodes of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meta_peft.adapters.hub import meta_learned
from meta_peft.config import MetaLoraConfig
from meta_peft.errors import MetaPeftError
from meta_peft.objectives import CLASSIFYING
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.run_tasks.base_view import BaseView
from meta_peft.tasks.encoding import Encoding
from meta_peft.tasks.prompt import INPUT_TARGET, NOT_TEXT, TAGGED, example_columns
from meta_peft.tasks.sources import rows_of_task
from meta_peft.tasks.support_selection import (
    NEED_THE_BASE,
    EncodedRow,
    SupportSelection,
    check_selection,
    chosen,
    features,
)
from meta_peft.utils.checked import whole

Row = Mapping[str, Any]
# By its first column, the first form that begins with it.
PROMPT_ONLY = {form[0]: form for form in reversed([("prompt", "completion"), *INPUT_TARGET, *NOT_TEXT])}
WRITTEN_FROM_LEFT = ("causal_lm", "seq2seq_lm", "speech_seq2seq")  # objectives whose answers depend on their beginning


def select_support(model: Any, pool: Sequence[Row], shots: int, how: str = "diverse", *, seed: int = 0) -> list[Row]:
    """The rows of a pool to adapt on, in the order they were chosen.

    Args:
        model: from `meta_peft.load`, or trained by `MetaTrainer`; it is left unchanged.
        pool: rows of one task in any form that `PromptFormat` reads. For diverse and uncertain, none of them needs an
            answer: rows with an ``input`` alone (or a ``prompt``, ``text``, ``question``, ``audio`` or ``tokens``) give
            those worth labelling.
        shots: how many.
        how: random, balanced, diverse or uncertain (see `tasks.support_selection`). Uncertain takes the highest loss of
            the base where rows have answers, else the highest entropy of what it would answer first.
        seed: of random and balanced.

    Raises:
        MetaPeftError: the pool is too small, or some of its rows have answers and some have none.
    """
    check_selection(how)
    whole("shots", shots, 1, 10**6)
    pool = rows_of_task(pool)
    if len(pool) < shots:
        raise MetaPeftError(f"The pool has {len(pool)} rows, and {shots} are to be chosen: lower shots, or add rows.")
    if how == "random":
        return [pool[i] for i in chosen(how, np.arange(len(pool)), shots, np.random.default_rng(seed))]
    learned = meta_learned(model)
    read = learned.sidecar.row_form.renamed_rows(pool)
    labelled = _labelled(read)
    if how == "balanced" and not labelled:
        raise MetaPeftError(
            "balanced goes over the answers, and the rows of this pool have none: use diverse or uncertain."
        )
    encoding = learned.encoding
    if labelled:
        encoded = list(map(encoding.of_task(read), read))
    else:
        encoded = [_without_answer(encoding(_with_placeholder(row, encoding)), encoding) for row in read]
    view = BaseView(model, encoding.collator(), objective=encoding.objective, labelled=labelled)
    known = features(how, encoded, view)
    return [pool[i] for i in chosen(how, known, shots, np.random.default_rng(seed))]


def episode_selection(
    model: Any, encoding: Encoding, args: MetaLoraConfig, *, sharded: bool
) -> SupportSelection | None:
    """What the episodes of a run choose support rows by; None for random ones."""
    how = args.support_selection
    if how == "random":
        return None
    if how in NEED_THE_BASE and sharded:
        raise MetaPeftError(
            f"support_selection={how} asks the base for one row after another in each process by itself, and a base in"
            " shards answers to all processes together: use random or balanced."
        )
    return SupportSelection(how, BaseView(model, encoding.collator(), objective=encoding.objective), args.seed)


def _labelled(pool: Sequence[Row]) -> bool:
    """Whether the rows have answers: all of them, or none."""
    alone = ["messages" not in row and _form_of_prompt(row) is not None for row in pool]
    if any(alone) and not all(alone):
        raise MetaPeftError(
            f"{sum(alone)} of {len(pool)} rows of the pool have no answer: give all of them one, or take it from all."
        )
    return not any(alone)


def _form_of_prompt(row: Row) -> tuple[str, str] | None:
    """The columns of a row that has a prompt and no answer."""
    try:
        example_columns(row.keys())
    except MetaPeftError:
        for first, form in PROMPT_ONLY.items():
            if first in row:
                return form
        raise
    return None


def _with_placeholder(row: Row, encoding: Encoding) -> Row:
    """The row with an answer, whichever: for a head it is a class that it has."""
    form = _form_of_prompt(row)
    assert form is not None
    first = next(iter(encoding.facts.label_names), 0)
    if form in TAGGED:
        return {**row, form[1]: [first] * len(row[form[0]])}
    return {**row, form[1]: first if encoding.objective in CLASSIFYING else "?"}


def _without_answer(row: EncodedRow, encoding: Encoding) -> EncodedRow:
    """The row with labels at the places that are predicted before anything was answered."""
    if encoding.objective not in WRITTEN_FROM_LEFT:
        return row
    labels = row["labels"]
    end = next(i for i, label in enumerate(labels) if label != IGNORED) + 1
    if encoding.objective == "causal_lm":  # which reads its answer too
        return {name: values[:end] for name, values in row.items()}
    return {**row, "labels": [*labels[:end], *[IGNORED] * (len(labels) - end)]}
