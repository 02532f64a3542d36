"""Archives from public package registries, fetched by the registries' own clients as the user has set them up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from meta_peft.errors import MetaPeftError


def cache_folder() -> Path:
    """``$META_PEFT_CACHE``, else ``meta_peft`` in the user's cache folder."""
    root = os.environ.get("META_PEFT_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "meta_peft"


def pip_download(package: str, version: str, folder: Path, *, source: bool = False) -> Path:
    """The wheel of a Python package, or its source archive; downloaded into `folder`, which must be empty."""
    command = [*_pip(), "download", "--quiet", "--no-deps", "--dest", str(folder), "--disable-pip-version-check"]
    command += ["--no-binary", package] if source else ["--only-binary", package]
    return _fetch([*command, f"{package}=={version}"], f"Python package {package}=={version}", folder)


def npm_download(package: str, version: str, folder: Path) -> Path:
    """The archive (``.tgz``) of an npm package; downloaded into `folder`, which must be empty."""
    command = ["npm", "pack", "--silent", f"{package}@{version}"]
    return _fetch(command, f"npm package {package}@{version}", folder)


def apt_download(package: str, folder: Path) -> Path:
    """The newest ``.deb`` of a Debian package; downloaded into `folder`, which must be empty."""
    return _fetch(["apt-get", "download", "--quiet", package], f"Debian package {package}", folder)


def _pip() -> list[str]:
    """The pip of this environment; where it has none, as with uv, that on the path: nothing is installed by it."""
    return [sys.executable, "-m", "pip"] if find_spec("pip") else ["pip"]


def _fetch(command: Sequence[str], what: str, folder: Path) -> Path:
    """The one file that `command` leaves in `folder`, where it runs."""
    client = "pip" if command[0] == sys.executable else command[0]
    if shutil.which(command[0]) is None:
        raise MetaPeftError(
            f"The {what} could not be had, since there is no {client} on this machine: install {client}."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise MetaPeftError(
            f"The {what} could not be had ({client}: {''.join(said)}): check the network, and that {client} finds"
            " packages on this machine."
        )
    (file,) = folder.iterdir()
    return file
