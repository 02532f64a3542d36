"""Killed at any moment, a run goes on to the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes.launching import launch
from safetensors.torch import load_file

pytestmark = pytest.mark.launch
SCRIPT = Path(__file__).with_name("killed.py")
FILES = ("adapter_model.safetensors", "meta_peft.safetensors", "meta_peft.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    kills = re.search(r"killed (\d+) times", launch(SCRIPT, folder))
    assert kills is not None
    assert int(kills[1]) >= 1
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["killed", "SIGTERM", "SIGINT"])
def test_the_bytes_of_an_uninterrupted_run(folder: Path, how: str, name: str):
    assert (folder / how / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_two_processes_that_were_started_again(folder: Path, name: str):
    assert (folder / "restarted" / name).read_bytes() == (folder / "uninterrupted" / name).read_bytes()


def test_another_number_of_processes(folder: Path):
    one, two = (load_file(folder / of / FILES[0]) for of in ("whole", "whole_of_one"))
    for name, expected in one.items():
        assert (two[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
