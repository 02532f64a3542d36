"""Registry clients as they are on this machine; pip with packages made here, the others where they fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from package_index import only_from, write_wheel

from meta_peft import MetaPeftError
from meta_peft.base import packages
from meta_peft.base.packages import apt_download, cache_folder, npm_download, pip_download


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    only_from(folder, monkeypatch)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_pip_brings_the_wheel(index: Path, target: Path):
    wheel = write_wheel(index, "some-words", "1.2", {"some_words/list.txt": b"a b"})
    found = pip_download("some-words", "1.2", target)
    assert found == target / wheel.name
    assert found.read_bytes() == wheel.read_bytes()


def test_another_version_does_not_do(index: Path, target: Path):
    write_wheel(index, "some-words", "1.2", {})
    expected = r"package some-words==1.3 could not be had \(pip: .*No matching distribution.*\): check the network"
    with pytest.raises(MetaPeftError, match=expected):
        pip_download("some-words", "1.3", target)


def test_an_environment_without_pip_takes_the_one_on_the_path(
    index: Path, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
):
    """As uv makes them."""
    wheel, pip, path = write_wheel(index, "some-words", "1.2", {}), shutil.which("pip"), os.environ["PATH"]
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MetaPeftError, match="there is no pip on this machine: install pip"):
        pip_download("some-words", "1.2", target)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text(f'#!/bin/sh\nPATH={path} exec {pip} "$@"\n')
    (tmp_path / "bin" / "pip").chmod(0o755)
    assert pip_download("some-words", "1.2", target).name == wheel.name


@pytest.mark.parametrize(
    ("client", "download"),
    [("npm", lambda folder: npm_download("words", "1.0.0", folder)), ("apt-get", lambda f: apt_download("words", f))],
)
def test_without_the_client(client: str, download, target: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(target))
    with pytest.raises(MetaPeftError, match=f"there is no {client} on this machine: install {client}"):
        download(target)


def test_any_client_runs_in_the_folder_and_its_words_are_passed_on(tmp_path: Path, target: Path, monkeypatch):
    """Programs with the clients' names stand in for what would need a network."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (("npm", 'echo "$@" > words-1.0.0.tgz'), ("apt-get", "echo E: Unable to locate >&2; exit 100")):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    assert npm_download("words", "1.0.0", target).read_text().split() == ["pack", "--silent", "words@1.0.0"]
    with pytest.raises(MetaPeftError, match=r"Debian package words could not be had \(apt-get: E: Unable to locate\)"):
        apt_download("words", target)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("META_PEFT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("META_PEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "meta_peft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "meta_peft"
