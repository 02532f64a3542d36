"""Translation rows, ``{"translation": {"en": ..., "de": ...}}``, as inputs and targets; a task is a pair of languages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations
from typing import Any

from datasets import Dataset

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.utils.checked import shown
from meta_peft.utils.words import listed

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
        raise _no_translation(kind)
    return list(languages)


def _no_translation(found: Any) -> MetaPeftError:
    return MetaPeftError(
        f"The column {COLUMN!r} must hold texts by language, {{'en': ..., 'de': ...}}; it holds {shown(found)}."
    )


def _pairs_of_batch(
    batch: Mapping[str, list[Any]], source: str | None, target: str | None, task_column: str, kept: list[str]
) -> dict[str, list[Any]]:
    columns = list(dict.fromkeys([*kept, "input", "target", task_column]))
    made: dict[str, list[Any]] = {column: [] for column in columns}
    for i, texts in enumerate(batch[COLUMN]):
        for pair in _pairs(texts or {}, source, target, task_column):
            row = pair | {column: batch[column][i] for column in kept}
            for column in columns:
                made[column].append(row[column])
    return made


def pairs_of_task(
    rows: Iterable[Mapping[str, Any]], source: str | None = None, target: str | None = None, *, task_column: str
) -> list[dict[str, Any]]:
    """What `as_pairs` makes of the rows of one task, which are in memory; rows without translations stay as they are.

    Raises:
        MetaPeftError: they are of several directions, and they do not say that these are one task.
    """
    made, directions = [], set()
    for row in rows:
        if COLUMN not in row:
            made.append(dict(row))
            continue
        texts = row[COLUMN] or {}
        if not isinstance(texts, Mapping):
            raise _no_translation(texts)
        pairs = list(_pairs(texts, source, target, task_column))
        directions |= set() if task_column in row else {pair[task_column] for pair in pairs}
        made += [pair | {column: value for column, value in row.items() if column != COLUMN} for pair in pairs]
    if len(directions) > 1:
        raise MetaPeftError(
            f"The translations are in the directions {listed(sorted(directions))}, each of which is a task: adapt to each"
            f" with adapt_folder (--task-column {task_column}), or give rows with an input and a target."
        )
    return made


def _pairs(
    texts: Mapping[str, Any], source: str | None, target: str | None, task_column: str
) -> Iterator[dict[str, Any]]:
    for one, other in _directions(texts, source, target):
        yield {"input": texts[one], "target": texts[other], task_column: f"{one}-{other}"}


def _directions(texts: Mapping[str, Any], source: str | None, target: str | None) -> Iterator[tuple[str, str]]:
    present = [language for language, text in texts.items() if text]
    for one, other in permutations(present, 2):
        if source in (None, one) and target in (None, other):
            yield one, other
