"""Software packages and whether a tag holds for them: python recipes/data/debtags.py [FOLDER]

Other data for the recipe text_classification. One task is one tag of Debian's, such as game::strategy: yes or no, for a
package by its description. The packages without the tag carry another one of its facet (game), so the topic alone does not
tell. Splits are by facet.

With --classes a task is a draw of four tags of any facet, and packages that have one of them alone: other data for the
recipe decoder_classification.

On Debian the packages are those that apt-cache knows (after apt-get update); elsewhere, give a
file Packages of a Debian mirror with --packages. A tag that nobody has set is noise in the answers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from family import Rows, Tasks, exclusive_draws, run, sample, split

from meta_peft.errors import MetaPeftError

SOURCE = """
# Debian packages and their tags

From the package lists of Debian. The descriptions were written by the packages' maintainers and are under the licences of
the packages; the tags were set by maintainers and users (https://wiki.debian.org/Debtags), and name no licence.
"""
ROWS_PER_LABEL = 24
WAYS, ENOUGH = 4, 60  # with --classes: tags of a task, packages that a tag must have
N_TASKS = {"train": 120, "validation": 16, "test": 30}
SHORTEST, LONGEST = 12, 100


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    packages = options.packages.read_text(encoding="utf-8") if options.packages else available()
    return draws_of(packages, options.seed) if options.classes else tasks_of(packages, options.seed)


def available() -> str:
    """The package lists of this machine."""
    if shutil.which("apt-cache") is None:
        raise MetaPeftError(
            "There is no apt-cache on this machine: name a file Packages of a Debian mirror as --packages."
        )
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode or "\nTag: " not in done.stdout:
        raise MetaPeftError("apt-cache knows no tags: run apt-get update, or name a file Packages as --packages.")
    return done.stdout


def tasks_of(packages: str, seed: int) -> dict[str, Tasks]:
    """Tasks by split: tags that enough packages have, and enough packages of the same facet have not."""
    tags_of = tagged(packages)
    tags = sorted({tag for tags in tags_of.values() for tag in tags})
    tasks: Tasks = {}
    for tag in tags:
        facet = tag.partition("::")[0] + "::"
        near = {text: found for text, found in tags_of.items() if any(other.startswith(facet) for other in found)}
        rows: Rows = []
        for label in ("yes", "no"):
            fitting = [
                {"text": text, "label": label} for text, found in near.items() if (tag in found) == (label == "yes")
            ]
            rows += sample(fitting, ROWS_PER_LABEL, seed)
        if len(rows) == 2 * ROWS_PER_LABEL:
            tasks[tag] = rows
    return split(tasks, seed, group=lambda tag: tag.partition("::")[0])


def draws_of(packages: str, seed: int) -> dict[str, Tasks]:
    """Tasks by split: four tags, and packages that have one of them alone; every facet's tags are in one split."""
    tags_of = tagged(packages)
    having: Tasks = {}
    for text, found in tags_of.items():
        for tag in sorted(found):
            having.setdefault(tag, []).append({"text": text, "label": tag})
    many = {
        tag: [row for row in rows if SHORTEST <= len(row["text"]) <= LONGEST]
        for tag, rows in sorted(having.items())
        if len(rows) >= ENOUGH
    }
    rng = np.random.default_rng(seed)
    parts = split(many, seed, group=lambda tag: tag.partition("::")[0])
    return {
        part: exclusive_draws(own, tags_of, WAYS, ROWS_PER_LABEL, N_TASKS[part], rng) for part, own in parts.items()
    }


def tagged(packages: str) -> dict[str, set[str]]:
    """Tags by short description, from paragraphs of lines ``Field: value``; lines that begin with a space go on."""
    found: dict[str, set[str]] = {}
    for paragraph in packages.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.replace("\n ", " ").splitlines() if ": " in line)
        if "Tag" in fields:
            text = fields.get("Description", fields.get("Description-en", ""))
            found.setdefault(text, set()).update(tag for tag in fields["Tag"].replace(",", " ").split() if "::" in tag)
    found.pop("", None)
    return found


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--classes", action="store_true", help="four tags of any facet in each task, as its classes")
    parser.add_argument("--packages", type=Path, metavar="FILE", help="a file Packages, instead of apt-cache")


def main(words: list[str] | None = None) -> int:
    return run("debtags", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
