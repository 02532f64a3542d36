"""Rows of a file, one at a time; what cannot be read is named by its file and line.

Text is read here and not by `pandas` or `pyarrow`, which guess types: they turn "2024-03-05" into a time stamp, "007"
into a number and "NA" into nothing.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.tasks.sources.class_names import name_classes
from meta_peft.utils.checked import shown

Row = dict[str, Any]

LARGEST_CELL = 2**26  # characters of CSV: more than any text has, and an open quote does not fill the memory


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, in memory."""
    return list(rows_of_file(existing(path)))


def rows_of_file(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv, .tsv, .txt or .parquet file. A line of a .txt file is a row with the column `text`.

    Sound that lies beside the file is named by its whole path.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise MetaPeftError(
            f"{path} is of no known kind: name it {', '.join(READERS)}.{did_you_mean(path.suffix, READERS)}"
        )
    empty = True
    for row in reader(path):
        empty = False
        yield _with_sound_beside(row, path.parent)
    if empty:
        raise MetaPeftError(f"{path} has no rows.")


def existing(path: str | Path) -> Path:
    """The path, or an error if there is no such file."""
    if Path(path).is_dir():
        raise MetaPeftError(f"Expected a file of rows, and {str(path)!r} is a folder: name one of its files.")
    if not Path(path).is_file():
        raise MetaPeftError(f"There is no file {str(path)!r}.")
    return Path(path)


def _with_sound_beside(row: Row, folder: Path) -> Row:
    """Sound is named by its path from the file that names it, or from anywhere."""
    sound = row.get("audio")
    if isinstance(sound, str) and (folder / sound).is_file():
        return {**row, "audio": str((folder / sound).resolve())}
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, which end at newlines only: `str.splitlines` would split at U+2028 inside a string too."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                at = start + error.start
                raise MetaPeftError(
                    f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {at}). Save the file as UTF-8."
                ) from error
            yield number, text.removeprefix("\ufeff") if start == 0 else text  # the mark that some editors begin with
            start += len(line)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = _loaded(line)
        except (ValueError, RecursionError) as error:  # integers of thousands of digits and deep nesting too
            raise MetaPeftError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)}).") from error
        yield _checked(row, f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, which is read as a whole; or, as is common too, an object a line."""
    with path.open("rb") as file:
        first = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first != b"[":
        yield from _jsonl(path)
        return
    try:
        rows = _loaded("".join(line for _, line in _lines(path)))
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise MetaPeftError(f"{path}{where}: not JSON ({getattr(error, 'msg', error)}).") from error
    for number, row in enumerate(rows, start=1):
        yield _checked(row, f"{path}, item {number}")


def _loaded(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # of which Python would take the last one, without a word
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(next(n for n in names if names.count(n) > 1))} is in one object twice")
    return found


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise MetaPeftError(f"{where}: expected an object with columns, got {shown(row)}.")
    return row


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    """Every value is text, as it stands there."""
    csv.field_size_limit(max(LARGEST_CELL, csv.field_size_limit()))  # of this process; it begins at 128 KiB
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    read = 0  # lines of whole rows
    try:
        for values in reader:
            read = reader.line_num
            if not values:
                continue
            if not header:
                header = values
                if len(set(header)) < len(header) or "" in header:
                    raise MetaPeftError(f"{path}: the first line must name each column once; it is {shown(header)}.")
                continue
            if len(values) != len(header):
                raise MetaPeftError(
                    f"{path}, line {reader.line_num}: expected {len(header)} values, as in the first line, got"
                    f" {len(values)}. Put quotes around values that hold {delimiter!r}."
                )
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise MetaPeftError(f"{path}, line {read + 1}: not CSV ({error}).") from error  # where its row begins


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, "\t")


def _txt(path: Path) -> Iterator[Row]:
    return ({"text": line.strip()} for _, line in _lines(path) if line.strip())


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            named = name_classes(file.schema_arrow)
            for batch in file.iter_batches(1000):
                yield from map(named, batch.to_pylist())
    except pa.ArrowException as error:
        raise MetaPeftError(f"{path} is damaged or not Parquet ({shown(str(error))}).") from error


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _txt, ".parquet": _parquet}
