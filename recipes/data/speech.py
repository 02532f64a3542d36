"""Spoken prompts and what they say, some clips of one language per task: python recipes/data/speech.py [FOLDER]

They are the voice prompts of the telephone exchange Asterisk, read by one speaker for each language. Training tasks are
English, French and Russian, validation tasks Italian, test tasks Spanish. The packages come from Debian or Ubuntu with
apt-get; elsewhere, download the .deb files by hand and name their folder with --debs.
"""

from __future__ import annotations

import gzip
import io
import re
import sys
import tarfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from family import Tasks, run, sample
from sound import RATE, samples_of, write_clip

from meta_peft.base.packages import apt_download
from meta_peft.errors import MetaPeftError

SOURCE = """
# Spoken prompts

From the Debian packages `asterisk-core-sounds-LANGUAGE` (texts) and `asterisk-core-sounds-LANGUAGE-wav` (sound). Read by
Allison Smith (English, Spanish), June Wallack (French) and Carlo Flora (Italian); the Russian ones were provided by
Maxim Topal. Licence: CC BY-SA 3.0, Italian and Russian CC BY 3.0; all who took part are named in the packages' file
`copyright`. The sound was brought from 8 to 16 kHz.
"""
LANGUAGES = {"train": ("en", "fr", "ru"), "validation": ("it",), "test": ("es",)}
CLIPS, MOST_TASKS = 16, 12
SECONDS = (0.4, 8.0)


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    splits: dict[str, Tasks] = {}
    for part, languages in LANGUAGES.items():
        splits[part] = {}
        for language in languages:
            texts, sounds = (deb(name, options.debs, scratch) for name in packages(language))
            splits[part] |= tasks_of(language, texts, sounds, options.folder, options.seed)
    return splits


def packages(language: str) -> tuple[str, str]:
    """Debian's packages with the texts and with the sounds of a language."""
    return f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-wav"


def deb(package: str, folder: Path | None, scratch: Path) -> Path:
    if folder is None:
        (scratch / package).mkdir()
        return apt_download(package, scratch / package)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise MetaPeftError(f"There is no file {package}_*.deb in {folder}: download it there.")
    return found[-1]


def tasks_of(language: str, texts: Path, sounds: Path, folder: Path, seed: int) -> Tasks:
    """Tasks of `CLIPS` clips each, drawn at random; their clips go to `folder`."""
    said = {name: text for path, file in members(texts) if path.endswith(".txt.gz") for name, text in transcripts(file)}
    files = {
        re.sub(r".*/sounds/[^/]+/|\.wav$", "", path): file for path, file in members(sounds) if path.endswith(".wav")
    }
    heard = {name: samples_of(files[name]) for name in sorted(files.keys() & said.keys())}
    fitting = [{"name": name} for name, s in heard.items() if SECONDS[0] <= len(s) / RATE <= SECONDS[1]]
    drawn = [row["name"] for row in sample(fitting, CLIPS * MOST_TASKS, seed)]
    tasks: Tasks = {}
    for i, name in enumerate(drawn[: len(drawn) // CLIPS * CLIPS]):
        audio = write_clip(heard[name], folder, f"{language}/{name.replace('/', '-')}.wav")
        tasks.setdefault(f"{language} {i // CLIPS + 1}", []).append({"audio": audio, "text": said[name]})
    return tasks


def members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files of a Debian package: an ``ar`` archive with a member ``data.tar.*``."""
    data = package.read_bytes()
    at = 8
    while data.startswith(b"!<arch>\n") and at + 60 <= len(data):
        name, size = data[at : at + 16].decode().strip(" /"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size])) as files:
                for member in files:
                    if member.isfile() and (file := files.extractfile(member)):
                        yield member.name, file.read()
            return
        at += 60 + size + size % 2
    raise MetaPeftError(f"{package} is not a Debian package.")


def transcripts(file: bytes) -> Iterator[tuple[str, str]]:
    """Names and words of lines such as ``digits/1: one``; sounds without words, in brackets, are left out."""
    for line in gzip.decompress(file).decode("utf-8-sig").splitlines():
        name, colon, text = line.partition(":")
        text = " ".join(text.split())
        if colon and text and not line.startswith(";") and not re.search(r"[\[\]()<>]", text):
            yield name.strip(), text


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--debs", type=Path, help="a folder with the .deb files, instead of apt-get")


def main(words: list[str] | None = None) -> int:
    return run("speech", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
