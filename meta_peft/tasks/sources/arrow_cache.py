"""Rows written once to an Arrow file, which is then mapped into memory: a million rows take no more of it than ten.

The file lies in the cache of `datasets` under a name made of what it was made from, so that a second run finds it, and
beside it what `datasets` makes of it, such as its tokens.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.fingerprint import digest_of_code
from meta_peft.utils import digests
from meta_peft.utils.checked import shown

ROWS_AT_ONCE = 5000
KINDS = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    (Mapping, "an object"),
    ((list, tuple), "a list"),
)


def cached(key: str, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Dataset:
    """The table of `rows()`, found again by `key`; one that was damaged since then is written anew."""
    path = cache_folder() / f"{digests.of_texts(digest_of_code(), key)}.arrow"
    if path.is_file():
        with contextlib.suppress(pa.ArrowException, OSError):
            return Dataset.from_file(str(path))
    write(rows(), path)
    return Dataset.from_file(str(path))


def uncached(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """The table of rows that have no name to be found by again; its file goes when this process does."""
    path = Path(_temporary_folder().name) / f"{uuid.uuid4().hex}.arrow"
    write(rows, path)
    return Dataset.from_file(str(path))


def key_of_files(paths: Iterable[Path]) -> str:
    """From their names and contents: times do not tell apart what was written twice in a moment."""
    return digests.of_texts(*(part for path in paths for part in (path.name, digests.of_file(path))))


def cache_folder() -> Path:
    """Where tables are kept; a folder for this process where the cache of `datasets` cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "meta_peft"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(_temporary_folder().name)


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write `rows` to `path` as an Arrow stream: aside, then renamed.

    A column may turn out to hold more than its first rows did, such as texts after nothing. Then another part is begun,
    and all parts are written anew in the end.

    Raises:
        MetaPeftError: rows that do not make a table; the message names row and column.
    """
    parts: list[Path] = []
    schema: pa.Schema | None = None
    writer: pa.RecordBatchStreamWriter | None = None
    aside = f"{path.name}.{uuid.uuid4().hex}"
    try:
        for first, chunk in _chunks(rows):
            table = table_of(chunk, first)
            grown = table.schema if schema is None else _unified(schema, table.schema, first)
            if grown != schema:
                schema = grown
                if writer is not None:
                    writer.close()
                parts.append(path.with_name(f"{aside}.{len(parts)}"))
                writer = pa.ipc.new_stream(str(parts[-1]), schema)
            assert writer is not None
            writer.write_table(_with_schema(table, schema))
        if writer is None or schema is None:
            raise MetaPeftError("There are no rows, so there is no task to learn from.")
        writer.close()
        if len(parts) > 1:
            parts.append(path.with_name(f"{aside}.whole"))
            with pa.ipc.new_stream(str(parts[-1]), schema) as whole:
                for part in parts[:-1]:
                    with pa.memory_map(str(part)) as file, pa.ipc.open_stream(file) as reader:
                        for batch in reader:
                            whole.write_table(_with_schema(pa.Table.from_batches([batch]), schema))
        os.replace(parts[-1], path)
    finally:
        if writer is not None:
            writer.close()
        for part in parts:
            part.unlink(missing_ok=True)


def table_of(rows: list[Mapping[str, Any]], first: int = 0) -> pa.Table:
    """An Arrow table; `first` is the number of rows before these, for messages."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column(name, [row.get(name) for row in rows], first) for name in names})


def _column(name: str, values: list[Any], first: int) -> pa.Array:
    if "\0" in name or any(_has_nul_in_names(value) for value in values if isinstance(value, (dict, list))):
        raise MetaPeftError("A column has a name with a NUL character: rename it.")  # Arrow would cut the name there
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        kinds = [_kind(value) for value in values]
        known = [(i, kind) for i, kind in enumerate(kinds) if kind is not None]
        other = next((i for i, kind in known if kind != known[0][1]), None)
        said = (
            f"column {shown(name)}: {shown(str(error))}"
            if other is None
            else f"column {shown(name)} holds {known[0][1]} in row {first + known[0][0] + 1} and {kinds[other]} in row"
            f" {first + other + 1}"
        )
        raise no_table(said) from error


def no_table(said: str) -> MetaPeftError:
    return MetaPeftError(
        f"The rows do not make a table ({said}): each must have columns, and a column the same kind of value in every"
        " row, text for one."
    )


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    return next((name for types, name in KINDS if isinstance(value, types)), type(value).__name__)


def _has_nul_in_names(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any("\0" in str(name) or _has_nul_in_names(part) for name, part in value.items())
    return isinstance(value, list) and any(map(_has_nul_in_names, value))


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    iterator, first = iter(rows), 0
    while chunk := list(islice(iterator, ROWS_AT_ONCE)):
        yield first, chunk
        first += len(chunk)


def _unified(schema: pa.Schema, other: pa.Schema, first: int) -> pa.Schema:
    try:
        return pa.unify_schemas([schema, other], promote_options="permissive")
    except pa.ArrowException as error:
        raise no_table(f"after row {first} the values are of another kind: {shown(str(error))}") from error


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    def column(field: pa.Field) -> Any:
        if field.name not in table.column_names:
            return pa.nulls(len(table), field.type)
        values = table[field.name]
        if values.type == field.type:
            return values
        try:
            # A cast of objects in lists gives arrays that cannot be read (pyarrow 26).
            if pa.types.is_nested(field.type):
                return pa.array(values.to_pylist(), field.type)
            return values.cast(field.type)
        except pa.ArrowException as error:  # whole numbers that are too large to be written as fractions
            raise no_table(f"column {shown(field.name)}: {shown(str(error))}") from error

    return pa.table([column(field) for field in schema], schema=schema)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="meta_peft_", ignore_cleanup_errors=True))
    return _FOLDERS[0]
