"""What the site has besides the pages in this folder: the README as its home, and every file that a page links to.

Pages are written for the repository, where links to recipes and results lead out of ``docs``. Here these files lie beside
the pages, under the names that they have in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s]+)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HOME, CHANGES = "README.md", "CHANGELOG.md"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the home page, and whatever the pages link to outside of this folder."""
    pages = {f"docs/{file.src_uri}": (ROOT / "docs" / file.src_uri) for file in files if file.src_uri.endswith(".md")}
    waiting, seen = [HOME, CHANGES, *pages], set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        if path not in pages:
            files.append(_file(path, config))
        if path.endswith(".md"):
            text = FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
            waiting += [target for _, link in LINK.findall(text) if (target := _target(path, link))]
    return files


def _file(path: str, config: Any) -> File:
    if path.endswith(".md"):
        text = (ROOT / path).read_text(encoding="utf-8")
        return File.generated(config, _place(path), content=LINK.sub(lambda found: _moved(path, found), text))
    return File.generated(config, _place(path), abs_src_path=str(ROOT / path))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of this folder's pages that lead out of it."""
    path = f"docs/{page.file.src_uri}"
    if page.file.generated_by or not (ROOT / path).is_file():
        return markdown
    return LINK.sub(lambda found: _moved(path, found), markdown)


def _target(path: str, link: str) -> str | None:
    """The file that a link on the page at `path` leads to, by its path in the repository."""
    if "://" in link or link.startswith("mailto:"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if (ROOT / target).is_file() else None


def _moved(path: str, found: re.Match[str]) -> str:
    target = _target(path, found[2])
    if target is None:
        return found[0]
    here = posixpath.dirname(_place(path)) or "."
    return found[1] + posixpath.relpath(_place(target), here)


def _place(path: str) -> str:
    """Where a file of the repository lies on the site."""
    return "index.md" if path == HOME else path.removeprefix("docs/")
