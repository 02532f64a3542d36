"""Pushed to a hub and loaded from it, by the real client, which talks to a hub on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import loopback_hub
import pytest
import yaml
from loopback_hub import TOKEN, Hub
from surface import EVAL, TEST, TRAIN, config, letter_tasks, run_python, tiny_folder, trained_folder, write_jsonl

from meta_peft import ModelArguments, TaskArguments
from meta_peft.compare import CompareArguments
from meta_peft.main_job import run

UPLOADED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "meta_peft.json", "meta_peft.safetensors"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub.running() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with its card, and a checkpoint of its training beside it."""
    folder = Path(shutil.copytree(trained_folder(), tmp_path / "adapter"))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Mine\n")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_text("not for others")
    return folder


def in_client(hub: Hub, tmp_path: Path, code: str, *arguments: str, token: str | None = TOKEN) -> str:
    """What `code` prints in a process whose hub is this one."""
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    return run_python(code, *arguments, **own, **({"HF_TOKEN": token} if token else {"HF_TOKEN": ""}))


PUSH = "import sys, meta_peft\nprint(meta_peft.push(sys.argv[1], 'user/mine', private=len(sys.argv) > 2))"
LOAD = """
import sys
import meta_peft
from safetensors.torch import load_file
from peft import PeftModel
from transformers import AutoModelForCausalLM

revision = sys.argv[2] if len(sys.argv) > 2 else None
model = meta_peft.load(None, "user/mine", revision=revision)
rows = [{"input": "abc", "target": "pp"}, {"input": "bcd", "target": "pp"}]
model, metrics = meta_peft.adapt(model, rows)
print(metrics["support_loss_after"] < metrics["support_loss_before"])
stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "user/mine")
own = {n: p for n, p in model.named_parameters() if ".default." in n and "lora_" in n}
theirs = {n: p for n, p in stock.named_parameters() if "lora_" in n}
print(own.keys() == theirs.keys() and all(bool((own[n] == theirs[n]).all()) for n in own))
"""
FAILS = """
import sys
import meta_peft
try:
    meta_peft.{call}
except meta_peft.MetaPeftError as error:
    print(error)
"""


def test_pushed_and_loaded(hub: Hub, tmp_path: Path, folder: Path):
    said = in_client(hub, tmp_path, PUSH, str(folder))
    assert f"{hub.address}/user/mine" in said
    pushed = hub.repos["user/mine"]
    files = pushed.files("main")
    assert set(files) == UPLOADED
    assert all(files[name] == (folder / name).read_bytes() for name in UPLOADED)
    assert any(asked.startswith("PUT /lfs/") for asked in hub.asked), "weights go by the LFS protocol"
    assert in_client(hub, tmp_path, LOAD, str(tiny_folder()), token=None).split() == ["True", "True"]


def test_a_revision(hub: Hub, tmp_path: Path, folder: Path):
    in_client(hub, tmp_path, PUSH, str(folder))
    first = hub.repos["user/mine"].main
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    in_client(hub, tmp_path, PUSH, str(folder))
    assert hub.repos["user/mine"].main != first
    call = FAILS.format(call="load(None, 'user/mine')")
    assert "adapter_model.safetensors" in in_client(hub, tmp_path, call)
    again = LOAD.replace('"user/mine")\nown', '"user/mine", revision=revision)\nown')
    assert in_client(hub, tmp_path, again, str(tiny_folder()), first).split() == ["True", "True"]


def test_private_ones_are_for_those_who_may(hub: Hub, tmp_path: Path, folder: Path):
    in_client(hub, tmp_path, PUSH, str(folder), "private")
    assert hub.repos["user/mine"].private
    call = FAILS.format(call="load(None, 'user/mine')")
    assert "is neither a folder nor an adapter the hub gives" in in_client(hub, tmp_path, call, token=None)
    assert in_client(hub, tmp_path, LOAD, str(tiny_folder())).split() == ["True", "True"]


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_who_may_not_push_is_told_what_to_do(hub: Hub, tmp_path: Path, folder: Path, token: str | None):
    said = in_client(hub, tmp_path, FAILS.format(call=f"push({str(folder)!r}, 'user/mine')"), token=token)
    assert "The hub does not take" in said
    assert "hf auth login" in said
    assert hub.repos == {}


def test_what_is_not_there(hub: Hub, tmp_path: Path):
    said = in_client(hub, tmp_path, FAILS.format(call="load(None, 'user/other')"))
    assert "'user/other' is neither a folder nor an adapter the hub gives" in said


def test_an_adapter_without_a_sidecar(hub: Hub, tmp_path: Path, folder: Path):
    (folder / "meta_peft.json").unlink()
    in_client(hub, tmp_path, PUSH, str(folder))
    assert "has no meta_peft.json" in in_client(hub, tmp_path, FAILS.format(call="load(None, 'user/mine')"))


def test_a_folder_without_an_adapter(hub: Hub, tmp_path: Path):
    said = in_client(hub, tmp_path, FAILS.format(call=f"push({str(tmp_path)!r}, 'user/mine')"))
    assert "has no adapter_config.json and no adapter_model.safetensors" in said
    assert hub.asked == []


def test_the_card_of_a_run_has_what_the_hub_shows(tmp_path: Path):
    letters = {"train": TRAIN, "validation": EVAL, "test": TEST}
    files = {f"{s}_tasks": str(write_jsonl(tmp_path / f"{s}.jsonl", letter_tasks(letters[s]))) for s in letters}
    model = ModelArguments(str(tiny_folder()), lora_r=4, lora_target_modules=["q_proj"])
    args = config(tmp_path / "out", max_steps=1, hub_model_id="user/mine")
    run(model, TaskArguments(**files), args, CompareArguments("plain", [0, 3], [1.0]))
    card = (tmp_path / "out" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    values = yaml.safe_load(metadata)
    assert (values["base_model"], values["library_name"], values["pipeline_tag"]) == (
        str(tiny_folder()),
        "peft",
        "text-generation",
    )
    assert {"lora", "peft", "meta-learning"} <= set(values["tags"])
    (entry,) = values["model-index"]
    found = entry["results"][0]["metrics"]
    assert [metric["type"] for metric in found] == ["exact_match", "exact_match"]
    assert found[1]["name"] == "exact match after 3 steps on 2 examples"
    assert entry["name"] == "mine"
    for said in (
        "Learned from 8 tasks",
        "`say m`",
        "![Curves",
        "results.png",
        "## Citation",
        "## Licence",
        "user/mine",
    ):
        assert said in text
