"""Classes that `datasets` keeps as numbers with a list of names: they are learned by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Value

Row = dict[str, Any]


def name_classes(schema: pa.Schema | Features | None) -> Callable[[Row], Row]:
    """A function of a row that puts names in place of class numbers; a missing class (None or -1) is None."""
    if isinstance(schema, pa.Schema):
        schema = Features.from_arrow_schema(schema)
    names = {c: kind.names for c, kind in (schema or {}).items() if isinstance(kind, ClassLabel)}

    def named(row: Row) -> Row:
        return {**row, **{c: _name(row[c], names[c]) for c in names}} if names else row

    return named


def with_class_names(dataset: Dataset) -> Dataset:
    """The same table with names in place of class numbers."""
    columns = {c: kind.names for c, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    if not columns:
        return dataset
    features = Features({**dataset.features, **{c: Value("string") for c in columns}})
    return dataset.map(_name_columns, fn_kwargs={"columns": columns}, batched=True, features=features, desc="naming")


def _name_columns(batch: dict[str, list[Any]], columns: dict[str, list[str]]) -> dict[str, list[Any]]:
    return {c: [_name(value, names) for value in batch[c]] for c, names in columns.items()}


def _name(value: int | None, names: list[str]) -> str | None:
    return None if value is None or value < 0 else names[value]
