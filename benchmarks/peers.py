"""The libraries that meta_peft is measured against, in a folder of their own.

    python benchmarks/peers.py

downloads learn2learn, TorchOpt and higher in fixed versions into ``meta_peft/peers`` in the user's cache folder
(``$META_PEFT_CACHE/peers`` if that is set). The environment that runs this is not changed: a benchmark process puts the
folder at the end of its own path, so that torch and everything else stay what they are.

learn2learn 0.2.0 builds Cython extensions of its data loaders, which fails on Python 3.11. Its algorithms are plain
Python: they are imported from the unpacked source distribution, without the package's ``__init__``, which imports the
rest.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

LEARN2LEARN = "0.2.0"
VERSIONS = {"learn2learn": LEARN2LEARN, "torchopt": "0.7.3", "higher": "0.2.1"}
WITH_PIP = ["torchopt==0.7.3", "optree==0.20.0", "graphviz==0.21", "higher==0.2.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    install(folder())
    for name in VERSIONS:
        print(f"{name} {VERSIONS[name]}: {state(name)}")


def folder() -> Path:
    """Where the peers are, one folder for each version of Python."""
    root = os.environ.get("META_PEFT_CACHE")
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "meta_peft"
    return cache / "peers" / f"python{sys.version_info.major}.{sys.version_info.minor}"


def install(target: Path) -> None:
    """Fetch what is not there yet; the folder is whole or not there."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "peers"
        _pip("install", "--no-deps", "--target", made, *WITH_PIP)
        # Without isolation: pip asks the package for its metadata, which needs no more than setuptools.
        downloads = Path(temporary) / "downloads"
        options = ["--no-deps", "--no-binary", "learn2learn", "--no-build-isolation", "--dest", downloads]
        _pip("download", *options, f"learn2learn=={LEARN2LEARN}")
        with tarfile.open(next(downloads.glob("learn2learn-*.tar.gz"))) as archive:
            archive.extractall(temporary, filter="data")
        shutil.move(str(Path(temporary) / f"learn2learn-{LEARN2LEARN}" / "learn2learn"), str(made / "learn2learn"))
        os.replace(made, target)


def state(name: str) -> str:
    """What `import` says: "installed", or why the peer cannot be imported."""
    try:
        {"learn2learn": learn2learn_algorithms, "torchopt": torchopt, "higher": higher}[name]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "installed"


def learn2learn_algorithms() -> Any:
    """``learn2learn.algorithms``, without what the package's own ``__init__`` imports besides."""
    _on_path()
    if "learn2learn" not in sys.modules:
        package = ModuleType("learn2learn")
        package.__path__ = [str(folder() / "learn2learn")]
        sys.modules["learn2learn"] = package
    return importlib.import_module("learn2learn.algorithms")


def torchopt() -> Any:
    _on_path()
    return importlib.import_module("torchopt")


def higher() -> Any:
    _on_path()
    return importlib.import_module("higher")


def _on_path() -> None:
    if not folder().is_dir():
        raise ImportError("The peers are not installed: run python benchmarks/peers.py once.")
    if str(folder()) not in sys.path:
        sys.path.append(str(folder()))


def _pip(command: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
