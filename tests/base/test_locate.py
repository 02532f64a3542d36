from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from surface import tiny_folder

from meta_peft import MetaPeftError, ModelArguments
from meta_peft.base.base_config import base_config
from meta_peft.base.locate import SMOLLM2, locate


@pytest.fixture
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and an empty cache of ours."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("META_PEFT_CACHE", str(tmp_path / "ours"))
    return tmp_path


def fill_hub_cache(root: Path, files: tuple[str, ...]) -> None:
    folder = root / "hub" / f"models--{SMOLLM2.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for name in files:
        (folder / "snapshots" / "abc" / name).write_text("{}")


def made_model(root: Path) -> Path:
    folder = root / "ours" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A reachable hub on this machine; yields what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_other_names_are_left_alone(no_hub_cache: Path):
    made_model(no_hub_cache)
    for name in ("gpt2", str(tiny_folder()), "HuggingFaceTB/SmolLM2-135M"):
        assert locate(name) == name
    assert locate(SMOLLM2, "a-branch") == SMOLLM2


def test_a_model_in_the_hub_cache_comes_first(no_hub_cache: Path):
    made_model(no_hub_cache)
    fill_hub_cache(no_hub_cache, ("config.json", "model.safetensors"))
    assert locate(SMOLLM2) == SMOLLM2


def test_half_a_model_in_the_hub_cache_does_not_count(no_hub_cache: Path):
    folder = made_model(no_hub_cache)
    fill_hub_cache(no_hub_cache, ("config.json",))
    assert locate(SMOLLM2) == str(folder)


def test_offline_takes_the_package(no_hub_cache: Path):
    folder = made_model(no_hub_cache)
    assert constants.HF_HUB_OFFLINE
    assert locate(SMOLLM2) == str(folder)


def test_a_model_made_earlier_is_not_downloaded_again(no_hub_cache: Path, hub: list[str]):
    folder = made_model(no_hub_cache)
    assert locate(SMOLLM2) == str(folder)
    assert hub == []


def test_a_reachable_hub_is_used(no_hub_cache: Path, hub: list[str]):
    assert locate(SMOLLM2) == SMOLLM2
    assert len(hub) == 1


def test_an_unreachable_hub_is_not(no_hub_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Then the package is tried, which cannot be had here either."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(MetaPeftError, match="neither from the hub nor from the package"):
        locate(SMOLLM2)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../no/where", "~/nothing"])
def test_a_path_that_there_is_not_is_no_id_of_a_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    said = re.escape(f"There is no folder {name!r}: ") + (
        "~ stands for" if name[0] == "~" else "correct the path, or give"
    )
    with pytest.raises(MetaPeftError, match=f"^{said}"):
        locate(name)
    with pytest.raises(MetaPeftError, match=f"^{said}"):
        base_config(ModelArguments(name))
    (tmp_path / "nothing").mkdir()
    assert locate("./nothing") == "./nothing"
