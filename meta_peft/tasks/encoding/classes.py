"""Names and numbers of classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.encoding.facts import IDS, NUMBERS, UNKNOWN, Facts
from meta_peft.tasks.plain import plain
from meta_peft.tasks.written import written
from meta_peft.utils.checked import is_number, shown

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding

FAR_APART = 10  # classes for each number that is there: of so many, nearly all would be nobody's
WHOLE = re.compile(r"\s*([+-]?[0-9]{1,18})(\.0*)?\s*")


def each(labels: Iterable[Any]) -> Iterator[Any]:
    """Labels, or those in lists of labels, one by one."""
    for label in map(plain, labels):
        yield from label if isinstance(label, list) else [label]


def whole_number(label: Any) -> int | None:
    """The whole number that a label is: also as a float, which a table makes of a column that lacks some, or as a text."""
    if isinstance(label, str):
        read = WHOLE.fullmatch(label)
        return int(read[1]) if read else None
    return int(label) if isinstance(label, int) or (isinstance(label, float) and label.is_integer()) else None


def class_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """The names among `labels`, or among lists of labels, each once, in alphabetical order. Numbers have no names."""
    return tuple(sorted({name for name in each(labels) if isinstance(name, str)}))


def names_of_task(labels: Sequence[Any], facts: Facts) -> tuple[str, ...]:
    """The names of one task's classes, by number. Ids are names as well, in their own order, unless the head has them all.

    Raises:
        MetaPeftError: a name may be the number of a class, and what labels were in training is not known.
    """
    names, room = class_names(labels), range(facts.num_labels)
    numbers = {label for label in each(labels) if is_number(label)}
    if facts.labels == IDS and not names and not all(whole_number(number) in room for number in numbers):
        return tuple(map(written, sorted(numbers)))
    if facts.labels == UNKNOWN and (doubtful := [name for name in names if whole_number(name) in room]):
        raise MetaPeftError(
            f"Label {shown(doubtful[0])} may be the number of a class, or a name: this adapter is of an earlier version,"
            " which did not write down what labels were in its training. Give numbers where they were numbers, as JSON"
            f" and Parquet keep them; else names that are none, such as {'class ' + doubtful[0]!r}."
        )
    return names


def class_count(labels: Iterable[Any]) -> int:
    """The classes that a head needs for these labels, or lists of labels: as many as names, or as the numbers from 0.

    Raises:
        MetaPeftError: numbers are so far apart that they cannot be meant to be those of classes.
    """
    found = set(each(labels))
    numbers = {whole_number(label) for label in found if not isinstance(label, str)} - {None}
    needed = 1 + max((number for number in numbers if number is not None), default=-1)
    if needed > FAR_APART * max(1, len(numbers)):
        raise MetaPeftError(
            f"A label that is a number is the number of a class, from 0: for {len(numbers)} of them, of which the largest"
            f" is {needed - 1}, the head would have {needed} classes. Number them from 0, or make them text, so that they"
            " are names; or say with num_labels that the head is to have so many."
        )
    return max(len(class_names(found)), needed)


def class_of(label: Any, how: Encoding) -> int:
    """The number of the class that a row of data has: as `class_number`, but of what may be a number or a name.

    In some files, such as CSV, all values are text, and in others numbers are numbers. What they were in training counts.
    """
    facts, names, label = how.facts, how.facts.label_names, plain(label)
    number, is_text = whole_number(label), isinstance(label, str)
    if facts.labels == NUMBERS and is_text:
        if number is None:
            raise MetaPeftError(
                f"Label {shown(label)} is no number, and labels were numbers in training: give the number of a class, 0 to"
                f" {facts.num_labels - 1}."
            )
        return class_number(number, how)
    if facts.labels == IDS and not is_text and written(label) in names:
        return names.index(written(label))
    if not is_text and number is not None and str(number) in names and names.index(str(number)) != number:
        raise MetaPeftError(
            f"A label is the number {number}, and the known classes {shown(list(names))} have a name that reads the same,"
            f" which is not class {number}: give it as text, {str(number)!r}."
        )
    return class_number(label, how)


def class_number(label: Any, how: Encoding) -> int:
    """The number of a class, given as itself or by name."""
    names, most, label = how.facts.label_names, how.facts.num_labels, plain(label)
    if isinstance(label, str):
        if label not in names:
            raise MetaPeftError(
                f"Label {shown(label)} is none of the {len(names)} known classes {shown(list(names))}: give one of these,"
                " or the number of a class."
            )
        return names.index(label)
    number = whole_number(label)
    if number is None:
        raise MetaPeftError(f"A label must be the name of a class or its number; got {shown(label)}.")
    if not 0 <= number < most:
        raise MetaPeftError(
            f"A label is class {number}, and the head has the classes 0 to {most - 1}: set num_labels to the most classes"
            " that a task has, numbered from 0."
        )
    return number
