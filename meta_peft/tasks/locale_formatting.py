"""The demo tasks: write dates, times, numbers, percentages and amounts the way a locale does.

One task is one (locale, kind), for instance ``de/date_medium``: "2024-03-05" becomes "05.03.2024". The rule can be had
only from the examples, rows are short, and there are many real tasks. The answers come from the Unicode CLDR data in
the package `babel` (``pip install 'meta-peft[demo]'``).

Locales that behave alike on a set of probes are one task. The splits are by language, and no task of one answers half of
its rows as a task of another does.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.task_set import TaskSet

SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}
PROBES = 24
ROWS_PER_TASK = 48

Format = Callable[..., str]  # of a value and a locale
Named = dict[str, list[dict[str, str]]]


def locale_formatting(*, digits_only: bool = True, seed: int = 0) -> dict[str, TaskSet]:
    """Tasks by split.

    Args:
        digits_only: leave out tasks whose answers contain letters, such as month names, which no example of another
            month gives away.
        seed: which languages are in which split, and which values are asked for.
    """
    tasks = _distinct_tasks(digits_only, seed)
    languages = sorted({name.split("/")[0].split("_")[0] for name in tasks})
    np.random.default_rng([seed, 1]).shuffle(languages)
    bounds = np.cumsum([round(share * len(languages)) for share in SPLITS.values()])
    split_of = {lang: list(SPLITS)[int(np.searchsorted(bounds[:-1], i, "right"))] for i, lang in enumerate(languages)}
    splits: dict[str, Named] = {split: {} for split in SPLITS}
    for name, rows in tasks.items():
        splits[split_of[name.split("/")[0].split("_")[0]]][name] = rows
    return {split: TaskSet.from_mapping(named) for split, named in _without_near_copies(splits).items()}


def _distinct_tasks(digits_only: bool, seed: int) -> Named:
    """Rows by task name, for the first of each distinct behaviour, of whatever locale and kind.

    Some kinds ask the same: where the short and the medium form of a date are written alike, they are one task.
    """
    locales, formats = _babel()
    tasks, seen = {}, set()
    for kind, (draw, show, write) in formats.items():
        values = _distinct(draw, np.random.default_rng([seed, 2]), ROWS_PER_TASK)
        asked = tuple(map(show, values[:PROBES]))
        for name, locale in locales.items():
            as_there = partial(write, locale=locale)
            answers = _answers(values[:PROBES], as_there, digits_only)
            if answers is None or (behaviour := (*asked, *answers)) in seen:
                continue
            seen.add(behaviour)
            answers += map(as_there, values[PROBES:])
            rows = zip(values, answers, strict=True)
            tasks[f"{name}/{kind}"] = [{"input": show(value), "target": answer} for value, answer in rows]
    return tasks


def _answers(values: list[Any], write: Callable[[Any], str], digits_only: bool) -> list[str] | None:
    """None if one of them has a letter and none may: most that do have it in the first."""
    answers = []
    for value in values:
        answer = write(value)
        if digits_only and any(map(str.isalpha, answer)):
            return None
        answers.append(answer)
    return answers


def _without_near_copies(splits: dict[str, Named]) -> dict[str, Named]:
    """Without tasks that answer at least half of their rows as a task of an earlier split does."""
    kept: dict[str, Named] = {}
    for split, tasks in splits.items():
        earlier = [_examples(rows) for named in kept.values() for rows in named.values()]
        own = {name: _examples(rows) for name, rows in tasks.items()}
        copies = {name for name, rows in own.items() if any(2 * len(rows & other) >= len(rows) for other in earlier)}
        kept[split] = {name: rows for name, rows in tasks.items() if name not in copies}
    return kept


def _examples(rows: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(row["input"], row["target"].casefold()) for row in rows}


def _distinct(draw: Callable[[np.random.Generator], Any], rng: np.random.Generator, n: int) -> list[Any]:
    values: dict[Any, None] = {}
    while len(values) < n:
        values[draw(rng)] = None
    return list(values)


def _babel() -> tuple[
    dict[str, Any], dict[str, tuple[Callable[[np.random.Generator], Any], Callable[[Any], str], Format]]
]:
    """All locales, and by kind how to draw a value, how to show it as input and how a locale writes it."""
    try:
        from babel import Locale, dates, localedata, numbers
    except ImportError as error:
        raise MetaPeftError("The locale-formatting tasks need babel: pip install 'meta-peft[demo]'.") from error

    def written(format_: Any, value: Any, *, locale: Any, **options: Any) -> str:
        text: str = format_(value, locale=locale, **options)
        return " ".join(text.replace("\u200f", "").replace("\u200e", "").replace("\u061c", "").split())

    formats: dict[str, Any] = {}
    for style in ("short", "medium", "long", "full"):
        formats[f"date_{style}"] = (_date, str, partial(written, dates.format_date, format=style))
    for style in ("short", "medium"):
        formats[f"time_{style}"] = (_time, str, partial(written, dates.format_time, format=style))
    formats["datetime_short"] = (_datetime, _minutes, partial(written, dates.format_datetime, format="short"))
    formats["number"] = (_number, str, partial(written, numbers.format_decimal))
    formats["percent"] = (_share, str, partial(written, numbers.format_percent, format=None))
    formats["amount"] = (
        _amount,
        lambda value: f"{value} EUR",
        partial(written, numbers.format_currency, currency="EUR"),
    )
    # Parsed once: babel would do so for each of a quarter of a million answers.
    return {name: Locale.parse(name) for name in sorted(localedata.locale_identifiers())}, formats


def _date(rng: np.random.Generator) -> dt.date:
    return dt.date(1950, 1, 1) + dt.timedelta(days=int(rng.integers(36_500)))


def _time(rng: np.random.Generator) -> dt.time:
    return dt.time(int(rng.integers(24)), int(rng.integers(60)), int(rng.integers(60)))


def _datetime(rng: np.random.Generator) -> dt.datetime:
    return dt.datetime.combine(_date(rng), _time(rng).replace(second=0))


def _minutes(value: dt.datetime) -> str:
    return value.isoformat(" ", "minutes")


def _number(rng: np.random.Generator) -> Decimal:
    """A signed number of one to seven digits with up to three decimals."""
    digits, decimals = int(rng.integers(1, 8)), int(rng.integers(0, 4))
    value = Decimal(int(rng.integers(10 ** (digits - 1), 10**digits))) + Decimal(
        int(rng.integers(10**decimals))
    ).scaleb(-decimals)
    return -value if rng.random() < 0.2 else value


def _share(rng: np.random.Generator) -> Decimal:
    return Decimal(int(rng.integers(-2_000, 50_000))).scaleb(-3)


def _amount(rng: np.random.Generator) -> Decimal:
    return Decimal(int(rng.integers(1, 10 ** int(rng.integers(3, 10))))).scaleb(-2)
