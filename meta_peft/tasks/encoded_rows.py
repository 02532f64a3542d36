"""The rows of a table as features: all at once, kept on disk with the table, or each when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoding import Encoding, token_classification
from meta_peft.tasks.fingerprint import fingerprint
from meta_peft.tasks.multiple_choice import CHOICES
from meta_peft.tasks.row_index import task_name
from meta_peft.utils import digests

WAS_CUT = "was_cut"
TAGGING = "token_classification"  # where a row that is too long loses whole words
AT_ONCE = 100_000  # rows of one column that are looked at together


@dataclass(frozen=True)
class RowEncoding:
    """How each row of a table becomes features.

    Args:
        encoding: that of all tasks, or of each by its name.
        task_columns: what names the task of a row, and stays beside its features.
    """

    encoding: Encoding | Mapping[str, Encoding]
    task_columns: Sequence[str]

    def of_table(self, table: Dataset, num_proc: int | None = None) -> tuple[Dataset, np.ndarray]:
        """A table of features, and which of its rows were cut, ``[N]``.

        The next run finds it again if the table is on disk.
        """
        parts = fingerprint(self.encoding, self.task_columns)
        encode = partial(
            table.map,
            self._counted,
            remove_columns=[c for c in table.column_names if c not in self.task_columns],
            new_fingerprint=parts and digests.of_texts(table._fingerprint, parts),
            num_proc=num_proc,
            desc="encoding",
        )
        try:
            encoded = encode()
        except (pa.ArrowInvalid, OSError):  # a file in the cache that was damaged
            encoded = encode(load_from_cache_file=False)
        flags = encoded.select_columns([WAS_CUT]).with_format("numpy").iter(AT_ONCE)
        was_cut = np.concatenate([part[WAS_CUT] for part in flags])
        encoded = encoded.remove_columns([WAS_CUT])
        if "input_features" in encoded.column_names:  # as lists of numbers they would be slow
            encoded = encoded.with_format("numpy", ["input_features"], output_all_columns=True)
        return encoded, was_cut

    def when_drawn(self, table: Dataset) -> Dataset:
        """The same table, whose rows become features when they are asked for."""
        return table.with_transform(self._batch)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._of(row)(row)
        except MetaPeftError as error:
            raise MetaPeftError(f"{error} (In task {self._task(row)!r}.)") from error

    def _counted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        features = self(row)
        return features | {WAS_CUT: _was_cut(row, features, self._of(row))}

    def _batch(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        encoded = [{**{column: row[column] for column in self.task_columns}, **self(row)} for row in rows]
        return {name: [row[name] for row in encoded] for name in encoded[0]}

    def _of(self, row: Mapping[str, Any]) -> Encoding:
        return self.encoding[self._task(row)] if isinstance(self.encoding, Mapping) else self.encoding

    def _task(self, row: Mapping[str, Any]) -> str:
        return task_name(row[column] for column in self.task_columns)


def _was_cut(row: Mapping[str, Any], features: Mapping[str, Any], how: Encoding) -> bool:
    if how.objective == TAGGING:
        return token_classification.lost_words(row, features)
    length = len(features.get("input_ids", ()))
    if length < how.max_length and not features.get(CHOICES):  # the longest choice may be another one
        return False
    roomier = replace(how, max_length=how.max_length + 1)  # with room for one token more, would it have that one?
    return len(roomier(row).get("input_ids", ())) > length
