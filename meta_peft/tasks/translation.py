"""Translation rows, ``{"translation": {"en": ..., "de": ...}}``, as inputs and targets; a task is a pair of languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

from datasets import Dataset

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.utils.checked import shown

COLUMN = "translation"


def as_pairs(
    dataset: Dataset, source: str | None = None, target: str | None = None, *, task_column: str = "task"
) -> Dataset:
    """A row with `input` and `target` for each direction that a row has both languages of.

    Args:
        dataset: with the column `translation`.
        source, target: only these directions: from this language, to this one; any by default.
        task_column: is added with the name of the direction, such as ``en-de``, unless the rows have it.
    """
    languages = _languages(dataset)
    for option, language in (("source_lang", source), ("target_lang", target)):
        if language is not None and language not in languages:
            raise MetaPeftError(
                f"{option}: {language} is none of the languages {', '.join(languages)}.{did_you_mean(language, languages)}"
            )
    if source is not None and source == target:
        raise MetaPeftError(f"source_lang and target_lang are both {source}: give two languages.")
    options = {"source": source, "target": target, "task_column": task_column}
    kept = [column for column in dataset.column_names if column != COLUMN]
    return dataset.map(
        _pairs_of_batch, batched=True, fn_kwargs=options | {"kept": kept}, remove_columns=dataset.column_names
    )


def _languages(dataset: Dataset) -> list[str]:
    kind = dataset.features[COLUMN]
    languages = getattr(kind, "languages", None) or (list(kind) if isinstance(kind, dict) else [])
    if len(languages) < 2:
        raise MetaPeftError(
            f"The column {COLUMN!r} must hold texts by language, {{'en': ..., 'de': ...}}; it holds {shown(kind)}."
        )
    return list(languages)


def _pairs_of_batch(
    batch: Mapping[str, list[Any]], source: str | None, target: str | None, task_column: str, kept: list[str]
) -> dict[str, list[Any]]:
    columns = list(dict.fromkeys([*kept, "input", "target", task_column]))
    made: dict[str, list[Any]] = {column: [] for column in columns}
    for i, texts in enumerate(batch[COLUMN]):
        for one, other in _directions(texts or {}, source, target):
            row = {"input": texts[one], "target": texts[other], task_column: f"{one}-{other}"}
            row |= {column: batch[column][i] for column in kept}
            for column in columns:
                made[column].append(row[column])
    return made


def _directions(texts: Mapping[str, Any], source: str | None, target: str | None) -> Iterator[tuple[str, str]]:
    present = [language for language, text in texts.items() if text]
    for one, other in permutations(present, 2):
        if source in (None, one) and target in (None, other):
            yield one, other
