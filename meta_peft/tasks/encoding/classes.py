"""Names and numbers of classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.plain import plain
from meta_peft.utils.checked import shown

if TYPE_CHECKING:
    from meta_peft.tasks.encoding import Encoding


def class_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """The names among `labels`, or among lists of labels, each once, in alphabetical order. Numbers have no names."""
    found: set[str] = set()
    for label in labels:
        found.update(name for name in (label if isinstance(label, list) else [label]) if isinstance(name, str))
    return tuple(sorted(found))


def class_count(labels: Iterable[Any]) -> int:
    """The classes that a head needs for these labels, or lists of labels: as many as names, or as the numbers from 0."""
    labels = list(labels)
    numbers = (n for label in labels for n in (label if isinstance(label, list) else [label]) if isinstance(n, int))
    return max(len(class_names(labels)), 1 + max(numbers, default=-1))


def class_of(label: Any, how: Encoding) -> int:
    """The number of the class that a row of data has: as `class_number`, but of a number that may be meant as a name.

    Names that are digits were text in training, as all values of a CSV file are, and are numbers in another file.
    """
    names, label = how.facts.label_names, plain(label)
    if isinstance(label, int) and str(label) in names and names.index(str(label)) != label:
        raise MetaPeftError(
            f"A label is the number {label}, and the known classes {shown(list(names))} have a name that reads the same,"
            f" which is not class {label}: give it as text, {str(label)!r}."
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
    if not isinstance(label, int):
        raise MetaPeftError(f"A label must be the name of a class or its number; got {shown(label)}.")
    if not 0 <= label < most:
        raise MetaPeftError(
            f"A label is class {label}, and the head has the classes 0 to {most - 1}: set num_labels to the most classes"
            " that a task has, numbered from 0."
        )
    return int(label)
