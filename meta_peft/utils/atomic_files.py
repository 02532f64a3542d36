"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, content: str | Callable[[Path], object]) -> Path:
    """Write a text, or what `content` writes to the path that it is given, which has the ending of `path`.

    Folders that are missing are made. Whoever is killed leaves the old file, if there was one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{path.name}")
    if callable(content):
        content(partial)
    else:
        partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
    return path
