"""What files and texts are known by: SHA-256, in hexadecimal."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCKS, BLOCK = 1024, 1 << 14


def of_file(path: Path) -> str:
    """The digest of a file's bytes, of which it holds a part at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_sample(path: Path) -> str:
    """The digest of a file's size and of 16 MiB of it, spread evenly, so that many gigabytes are quick; of small ones, all.

    What was trained on is another file all over, and is told apart by it; a change of a few bytes may not be.
    """
    size = path.stat().st_size
    if size <= BLOCKS * BLOCK:
        return of_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def of_texts(*texts: str) -> str:
    """The first 128 bits of the digest of texts, kept apart by NULs; they may hold halves of surrogate pairs."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
