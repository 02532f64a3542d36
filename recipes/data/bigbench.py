"""Tasks of BIG-bench, which two programs beside this file use."""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meta_peft.base.packages import cache_folder, pip_download

PACKAGE, VERSION = "bigbench", "1.0.0"
FAMILIES = ("qa_wikidata", "mult_data_wrangling")
SOURCE = f"""
From the source archive of the Python package {PACKAGE}=={VERSION}: BIG-bench, Srivastava et al., Beyond the Imitation
Game, TMLR 2023. The package names no licence, the project's repository Apache-2.0. The files carry a canary and ask
never to be in a training corpus: use them, and adapters trained on them, for measurements on your own machine, and
publish neither.
"""


def families(cache: Path | None = None) -> Path:
    """A folder with the tasks of `FAMILIES`; at the first call 358 MB are downloaded for them, and not kept."""
    folder = (cache or cache_folder()) / f"{PACKAGE}-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print("Downloading BIG-bench (358 MB, once).", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as scratch:
            archive, kept = Path(scratch) / "archive", Path(scratch) / "kept"
            archive.mkdir()
            unpack(pip_download(PACKAGE, VERSION, archive, source=True), kept)
            kept.rename(folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """The files ``FAMILY/**/task.json`` of the source archive, in `folder`."""
    with tarfile.open(archive) as files:
        for member in files:
            _, _, inside = member.name.partition("/benchmark_tasks/")
            if inside.split("/")[0] in FAMILIES and inside.endswith("/task.json") and ".." not in inside:
                path = folder / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                file = files.extractfile(member)
                assert file is not None
                path.write_bytes(file.read())


def examples(file: Path) -> Iterator[tuple[str, str]]:
    """Input and target of the examples that have a single target."""
    task: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for example in task["examples"]:
        if isinstance(example["target"], str):
            yield example["input"].strip(), example["target"].strip()
