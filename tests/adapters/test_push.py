"""Pushed to a hub and loaded from it, by the real client, which talks to a hub on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import loopback_hub
import pytest
import yaml
from loopback_hub import TOKEN, Hub
from peft import PeftModel
from surface import (
    EVAL,
    TEST,
    TRAIN,
    base_model,
    bits,
    config,
    letter_rows,
    letter_tasks,
    run_python,
    stock_logits,
    tiny_folder,
    trained_folder,
    trainer,
    write_jsonl,
)

from meta_peft import MetaPeftError, ModelArguments, TaskArguments, adapt_many, load, push
from meta_peft.adapters.hub import fetch
from meta_peft.cli import main
from meta_peft.comparison.compare import CompareArguments
from meta_peft.lora.fast_weights import FastWeights
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


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    loopback_hub.connect(monkeypatch, hub, tmp_path / "home")
    return hub


def weights_of(adapter: str, **options: str) -> dict[str, bytes]:
    return bits(dict(FastWeights(load(base_model(), adapter, **options)).parameters()))


PUSH_AND_LOAD = """
import os
import sys
import meta_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

print(meta_peft.push(sys.argv[1], "user/mine"))
os.environ["HF_TOKEN"] = ""  # anybody may load it

model = meta_peft.load(None, "user/mine")
rows = [{"input": "abc", "target": "pp"}, {"input": "bcd", "target": "pp"}]
model, metrics = meta_peft.adapt(model, rows)
print(metrics["support_loss_after"] < metrics["support_loss_before"])
stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), "user/mine")
own = {n: p for n, p in model.named_parameters() if ".default." in n and "lora_" in n}
theirs = {n: p for n, p in stock.named_parameters() if "lora_" in n}
print(own.keys() == theirs.keys() and all(bool((own[n] == theirs[n]).all()) for n in own))
"""


def test_pushed_and_loaded(hub: Hub, tmp_path: Path, folder: Path):
    client = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    said = run_python(PUSH_AND_LOAD, str(folder), str(tiny_folder()), HF_HOME=str(tmp_path / "home"), **client)
    address, *found = said.splitlines()
    assert f"{hub.address}/user/mine" in address
    pushed = hub.repos["user/mine"]
    files = pushed.files("main")
    assert set(files) == UPLOADED
    assert all(files[name] == (folder / name).read_bytes() for name in UPLOADED)
    assert any(asked.startswith("PUT /lfs/") for asked in hub.asked), "weights go by the LFS protocol"
    assert found == ["True", "True"]


def test_a_revision(online: Hub, folder: Path):
    whole = (folder / "adapter_model.safetensors").read_bytes()
    push(folder, "user/mine")
    first = online.repos["user/mine"].main
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    push(folder, "user/mine")
    assert online.repos["user/mine"].main != first
    with pytest.raises(MetaPeftError, match=r"adapter_model\.safetensors"):
        load(base_model(), "user/mine")
    (folder / "adapter_model.safetensors").write_bytes(whole)
    assert weights_of("user/mine", revision=first) == weights_of(str(folder))


def test_private_ones_are_for_those_who_may(online: Hub, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    push(folder, "user/mine", private=True)
    assert online.repos["user/mine"].private
    assert weights_of("user/mine") == weights_of(str(folder))
    loopback_hub.connect(monkeypatch, online, tmp_path / "home of another", token=None)
    with pytest.raises(MetaPeftError, match="is neither a folder nor an adapter the hub gives"):
        load(base_model(), "user/mine")


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_who_may_not_push_is_told_what_to_do(
    hub: Hub, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
):
    loopback_hub.connect(monkeypatch, hub, tmp_path / "home", token=token)
    with pytest.raises(MetaPeftError, match=r"The hub does not take(.|\n)*hf auth login"):
        push(folder, "user/mine")
    assert hub.repos == {}


def test_what_is_not_there(online: Hub):
    with pytest.raises(MetaPeftError, match="'user/other' is neither a folder nor an adapter the hub gives"):
        load(None, "user/other")


def test_an_adapter_without_a_sidecar(online: Hub, folder: Path):
    (folder / "meta_peft.json").unlink()
    push(folder, "user/mine")
    with pytest.raises(MetaPeftError, match=r"has no meta_peft\.json"):
        load(None, "user/mine")


def test_a_folder_without_an_adapter(online: Hub, tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"has no adapter_config\.json and no adapter_model\.safetensors"):
        push(tmp_path, "user/mine")
    assert online.asked == []


def test_the_card_of_a_run_has_what_the_hub_shows(tmp_path: Path):
    letters = {"train": TRAIN, "validation": EVAL, "test": TEST}
    files = {f"{s}_tasks": str(write_jsonl(tmp_path / f"{s}.jsonl", letter_tasks(letters[s]))) for s in letters}
    model = ModelArguments(str(tiny_folder()), lora_r=4, lora_target_modules=["q_proj"])
    args = config(tmp_path / "out", max_steps=1, hub_model_id="user/mine")
    run(model, TaskArguments(**files), args, CompareArguments("plain", [0, 3], [1.0]))
    card = (tmp_path / "out" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    values = yaml.safe_load(metadata)
    assert (values["library_name"], values["pipeline_tag"]) == ("peft", "text-generation")
    assert str(tiny_folder()) not in card, "paths of this machine are not for others"
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
        "| `max_steps` | 1 |",
    ):
        assert said in text
    assert (tmp_path / "out" / "results.png").is_file()


# ---- runs that push


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_a_run_pushes_what_it_saves(online: Hub, tmp_path: Path, strategy: str):
    """Every commit is an adapter with its own sidecar, and nothing is pickled."""
    run = trainer(
        tmp_path / "out",
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="user/run",
        hub_strategy=strategy,
        hub_token=TOKEN,
    )
    assert set(online.repos) == {"user/run"}
    run.train()
    repo = online.repos["user/run"]
    during = [sha for sha, files in repo.commits.items() if "adapter_model.safetensors" in files]
    assert len(during) == {"every_save": 2, "checkpoint": 4, "end": 0}[strategy]
    run.save_model()
    trained = bits(dict(run.loss_fn.weights.parameters()))
    assert weights_of("user/run") == trained
    seen = [weights_of("user/run", revision=sha) for sha in during]
    assert all(weights != trained for weights in seen[:1])
    assert not seen or seen[-1] == trained
    for files in repo.commits.values():
        assert not any(name.endswith((".bin", ".pkl")) for name in files)
        assert not any(TOKEN.encode() in content for content in files.values())
        assert any(name.startswith("last-checkpoint/") for name in files) <= (strategy == "checkpoint")
    assert "user/run" in repo.files("main")["README.md"].decode()


def test_a_hub_that_is_gone_does_not_end_a_run(online: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = trainer(tmp_path / "out", save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="user/run")
    online.repos.clear()
    run.train()
    assert run.state.global_step == 2
    assert caplog.text.count("Training goes on.") == 2
    with pytest.raises(MetaPeftError, match="The hub does not take the adapter as 'user/run'"):
        run.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_run_that_may_not_push_says_so_before_it_trains(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loopback_hub.connect(monkeypatch, hub, tmp_path / "home", token=None)
    with pytest.raises(MetaPeftError, match=r"The hub gives no repository for 'user/run': no token.*hf auth login"):
        trainer(tmp_path / "out", push_to_hub=True, hub_model_id="user/run")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_adapted_adapter(online: Hub, tmp_path: Path):
    adapted = adapt_many(load(base_model(), trained_folder()), {"p": letter_rows("p")[:2]})["p"]
    assert adapted.push_to_hub("user/p", private=True).startswith(f"{online.address}/user/p/commit/")
    files = online.repos["user/p"].files("main")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert online.repos["user/p"].private
    assert 'PeftModel.from_pretrained(base, "user/p")' in files["README.md"].decode()
    adapted.save(tmp_path / "p")
    theirs = stock_logits(PeftModel.from_pretrained(base_model(), fetch("user/p")))
    assert bits({"": theirs}) == bits({"": stock_logits(PeftModel.from_pretrained(base_model(), tmp_path / "p"))})
    with pytest.raises(MetaPeftError, match=r"has no meta_peft\.json"):
        load(base_model(), "user/p")


def test_the_command(online: Hub, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["push", "--adapter", str(folder), "--to", "user/mine", "--private"]) == 0
    assert capsys.readouterr().out.startswith(f"{online.address}/user/mine/commit/")
    assert online.repos["user/mine"].private
    assert main(["push", "--adapter", str(folder.parent), "--to", "user/mine"]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def test_what_the_hub_refuses_is_explained(online: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    push(folder, "user/mine", private=True)
    with pytest.raises(MetaPeftError, match=r"'user/none' is neither .* none of this name that you may read"):
        load(None, "user/none")
    with pytest.raises(MetaPeftError, match="it has no such revision: give a branch"):
        load(None, "user/mine", revision="none")
    with pytest.raises(MetaPeftError, match="it is not an id of the hub, such as 'user/name'"):
        load(None, "no//id")
    with pytest.raises(MetaPeftError, match=r"there is none of this name that you may read|everybody may read"):
        load(None, "user/mine", token="hf_of_somebody_else")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert load(base_model(), "user/mine", token=TOKEN).meta_peft.sidecar.shots == 2
    with pytest.raises(MetaPeftError, match=r"The hub does not take .* as 'user/mine'"):
        push(folder, "user/mine")


def test_a_hub_that_does_not_answer(online: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(MetaPeftError, match="the hub could not be asked, or refused"):
        push(folder, "user/mine")


def test_a_card_with_a_path_would_be_refused(online: Hub, folder: Path):
    """What the cards of meta_peft leave out, the hub refuses."""
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\nbase_model: {tiny_folder()}\n---\n")
    with pytest.raises(MetaPeftError, match=r"not valid\. Use a model id"):
        push(folder, "user/mine")
