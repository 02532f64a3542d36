"""What files and texts are known by: SHA-256, in hexadecimal."""

from __future__ import annotations

import hashlib
from pathlib import Path


def of_file(path: Path) -> str:
    """The digest of a file's bytes, of which it holds a part at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_texts(*texts: str) -> str:
    """The first 128 bits of the digest of texts, kept apart by NULs; they may hold halves of surrogate pairs."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
