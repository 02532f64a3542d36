"""Short English texts and their translations, one language per task: python recipes/data/machine_translation.py [FOLDER]

They are the messages of the web framework Django with the translations that its community made, in some 60 languages
that are written in Latin letters (--all-scripts: and in all others). Messages with placeholders, markup or line breaks
are left out.
"""

from __future__ import annotations

import io
import sys
import unicodedata
import zipfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from family import Rows, Tasks, run, sample, split

from meta_peft.base.packages import pip_download
from meta_peft.errors import MetaPeftError

PACKAGE, VERSION = "Django", "5.2"
SOURCE = f"""
# Messages of Django {VERSION} and their translations

From the Python package {PACKAGE}=={VERSION}, files `locale/*/LC_MESSAGES/django.mo`. Copyright (c) Django Software
Foundation and individual contributors; the translators are named in the files `django.po` beside them. Licence:
BSD-3-Clause.
"""
ROWS, FEWEST_ROWS = 200, 48
LONGEST = 60
MARKS = set("%{}<>&\n\\")


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(pip_download(PACKAGE, VERSION, scratch), options.seed, options.all_scripts)


def tasks_of(wheel: Path, seed: int, all_scripts: bool = False) -> dict[str, Tasks]:
    """Tasks by split; a variant of a language that is there itself, such as pt_BR, is left out."""
    tasks: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/LC_MESSAGES/django.mo"):
                language = name.split("/")[-3]
                for message, translation in translations(archive.read(name)).items():
                    tasks.setdefault(language, {}).setdefault(message, translation)
    kept = {}
    for language, found in tasks.items():
        rows = [{"input": message, "target": found[message]} for message in sorted(found)]
        if len(rows) >= FEWEST_ROWS and (all_scripts or is_latin(rows)):
            kept[language] = sample(rows, ROWS, seed)
    return split({name: rows for name, rows in kept.items() if name.split("_")[0] not in kept.keys() - {name}}, seed)


def translations(catalogue: bytes) -> dict[str, str]:
    """Message and translation of a compiled gettext catalogue, for those that are short plain text."""
    try:
        from babel.messages.mofile import read_mo
    except ImportError as error:
        raise MetaPeftError("Catalogues of translations are read by babel: pip install babel.") from error

    return {
        message.id: message.string
        for message in read_mo(io.BytesIO(catalogue))
        if isinstance(message.id, str)
        and message.context is None
        and is_plain(message.id)
        and is_plain(message.string)
        and message.id != message.string
    }


def is_plain(text: str) -> bool:
    return 1 < len(text) <= LONGEST and text == text.strip() and not MARKS & set(text)


def is_latin(rows: Rows) -> bool:
    letters = [character for row in rows for character in row["target"] if character.isalpha()]
    return sum(unicodedata.name(character, "").startswith("LATIN") for character in letters) > 0.9 * len(letters)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--all-scripts", action="store_true", help="languages in other letters too")


def main(words: list[str] | None = None) -> int:
    return run("machine_translation", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
