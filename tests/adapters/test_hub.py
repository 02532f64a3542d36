from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from surface import (
    base_model,
    bits,
    letter_rows,
    logits_of_stock_peft,
    lora,
    peft_model,
    stock_logits,
    tiny_folder,
    tiny_tokenizer,
    trained_folder,
    trainer,
)
from tiny_models import fingerprint, randomise

from meta_peft import MetaPeftError, MetaTrainer, adapt, load, save
from meta_peft.adapters import hub
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.lora.fast_weights import FastWeights

FILES = {"adapter_config.json", "adapter_model.safetensors", "meta_peft.json", "meta_peft.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A meta-learned adapter that a test may change."""
    return Path(shutil.copytree(trained_folder(), tmp_path / "meta"))


def adapter_of(model: torch.nn.Module) -> dict[str, bytes]:
    return bits(dict(FastWeights(model).parameters()))


# ---- load and save


@pytest.mark.parametrize("kind", ["dense", "4bit", "8bit"])
def test_round_trip(tmp_path: Path, kind: str):
    before = fingerprint(base_model(kind))
    model = load(base_model(kind), trained_folder())
    assert adapter_of(model) == bits(load_file(trained_folder() / "adapter_model.safetensors"))
    assert {name.replace("base_model.model.", "").replace(".base_layer", "") for name in fingerprint(model)} == set(
        before
    )
    assert set(fingerprint(model).values()) == set(before.values())
    save(model, model.meta_peft.sidecar, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (trained_folder() / name).read_bytes(), name


@pytest.mark.parametrize("base", [None, "name", "path", "model"])
def test_the_base_in_any_form(base: str | None):
    given = {None: None, "name": str(tiny_folder()), "path": tiny_folder(), "model": base_model()}[base]
    model = load(given, trained_folder())
    assert model.active_adapters == ["default"]
    assert model.meta_peft.tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    assert not model.training


def test_the_bases_revision_is_that_of_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Which is where PEFT keeps it. What is said explicitly counts; another base has none of it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": "of-training"}))
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(hub, "load_base", lambda how: asked.append(("base", how.model_revision)) or base_model())
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(hub, "tokenizer_for", lambda how: asked.append(("tokenizer", how.model_revision)) or tokenizer)
    load(None, folder)
    load(Sidecar.read(folder).base.name, folder, model_revision="another")
    load("another/base", folder)
    assert asked == [
        *(("base", "of-training"), ("tokenizer", "of-training")),
        *(("base", "another"), ("tokenizer", "another")),
        *(("base", None), ("tokenizer", None)),
    ]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": 3}))
    with pytest.raises(MetaPeftError, match="revision"):
        load(None, folder)


def test_model_options_say_how_to_load_the_base():
    model = load(None, trained_folder(), load_in_4bit=True, dtype="bfloat16")
    assert model.get_base_model().is_loaded_in_4bit
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    with pytest.raises(
        MetaPeftError, match=r"\['dtype', 'load_in_4bit'\] say how to load a base model, but a loaded one"
    ):
        load(base_model(), trained_folder(), load_in_4bit=True, dtype="bfloat16")


def test_an_own_tokenizer():
    tokenizer = tiny_tokenizer()
    assert load(base_model(), trained_folder(), tokenizer=tokenizer).meta_peft.tokenizer is tokenizer


def test_a_model_card_on_request(tmp_path: Path):
    model = load(None, trained_folder())
    save(model, model.meta_peft.sidecar, tmp_path, card="# Mine")
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_a_saved_config_is_for_inference_and_the_live_one_is_not_changed(tmp_path: Path):
    model = load(None, trained_folder())
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = "cache/folder", False
    save(model, model.meta_peft.sidecar, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["inference_mode"]) == (str(tiny_folder()), True)
    assert (config.base_model_name_or_path, config.inference_mode) == ("cache/folder", False)


# ---- stock PEFT


def test_stock_peft_gives_the_same_logits(tmp_path: Path):
    """In a process in which meta_peft cannot be imported."""
    ours, folders = {}, {}
    for kind in ("dense", "4bit", "8bit"):
        folders[kind] = tmp_path / kind
        run = trainer(tmp_path, model=peft_model(kind))
        run.train()
        run.save_model(str(folders[kind]))
        ours[kind] = stock_logits(load(base_model(kind), folders[kind]))
        assert torch.equal(stock_logits(run.model), ours[kind])
        assert not torch.equal(stock_logits(base_model(kind)), ours[kind]), "with no adapter it would be the same"
    theirs = logits_of_stock_peft(folders, tmp_path / "logits.safetensors")
    assert bits(theirs) == bits(ours)


# ---- errors


def test_an_adapter_of_another_base(folder: Path):
    with pytest.raises(MetaPeftError, match="with other weights: load the base model the adapter belongs to"):
        load(base_model(folder=tiny_folder(seed=1)), folder)


def test_a_plain_adapter(folder: Path):
    (folder / "meta_peft.json").unlink()
    with pytest.raises(MetaPeftError, match="it is a plain PEFT adapter, or the files were not copied"):
        load(base_model(), folder)


def test_a_sidecar_of_another_adapter(folder: Path, tmp_path: Path):
    other = peft_model(target_modules=["q_proj"])
    sidecar = Sidecar.read(folder)
    hub.write_adapter(dict(FastWeights(other).parameters()), lora(target_modules=["q_proj"]), "x", folder)
    with pytest.raises(
        MetaPeftError, match=r"rates for 16 LoRA matrices, the adapter has 4 tensors.*do not belong together"
    ):
        load(base_model(), folder)
    with pytest.raises(MetaPeftError, match="do not belong together"):
        hub.attach(other, sidecar, tiny_tokenizer())
    with pytest.raises(MetaPeftError, match=r"rates for 16 LoRA matrices, the adapter has 4 .*do not belong together"):
        hub.save(other, sidecar, tmp_path / "other")
    assert not (tmp_path / "other").exists()  # what load would refuse is not written


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="is neither a folder nor an adapter the hub gives"):
        load(None, tmp_path / "nothing")
    with pytest.raises(MetaPeftError, match="'someone/something' is neither a folder nor an adapter the hub gives"):
        load(None, "someone/something")


def test_a_model_that_carries_nothing():
    with pytest.raises(MetaPeftError, match=r"carries no meta-learned adapter: get one from meta_peft\.load"):
        hub.meta_learned(peft_model())


# ---- saving is all or nothing for each file


class BrokenError(RuntimeError):
    pass


@pytest.mark.parametrize("broken", ["write_adapter", "sidecar", "card"])
def test_an_error_while_writing_leaves_the_old_files_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    model = load(None, folder)
    sidecar = model.meta_peft.sidecar
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomise(model)  # so that what is written differs

    def fails(*args, **kwargs):
        raise BrokenError

    if broken == "write_adapter":
        monkeypatch.setattr(hub, "save_file", fails)  # the config is written by then
    elif broken == "sidecar":
        monkeypatch.setattr(Sidecar, "write", fails)
    card = object() if broken == "card" else None  # what cannot be written as text
    with pytest.raises((BrokenError, TypeError)):
        save(model, sidecar, folder, card=card)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    monkeypatch.undo()
    save(model, sidecar, folder)
    assert adapter_of(load(None, folder)) == adapter_of(model)
    assert (folder / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


def test_an_adapted_model_saves_what_is_meta_learned(tmp_path: Path):
    """A sidecar says how to adapt from the start. What was adapted is saved with one only where it is named."""
    model, _ = adapt(load(None, trained_folder()), letter_rows("p")[:2])
    hub.save(model, model.meta_peft.sidecar, tmp_path / "start")
    for name in FILES:
        assert (tmp_path / "start" / name).read_bytes() == (trained_folder() / name).read_bytes(), name
    hub.save(model, model.meta_peft.sidecar, tmp_path / "adapted", adapter="adapted")
    assert adapter_of(load(None, tmp_path / "adapted")) == adapter_of(model)
    assert adapter_of(model) != adapter_of(load(None, tmp_path / "start"))


@pytest.mark.parametrize("renames", range(5))
def test_killed_while_files_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int):
    """The folder has the old adapter, the new one, or one that is refused; never files of both with a sidecar."""
    run = trainer(tmp_path / "run")
    old, new = run.sidecar(), replace(run.sidecar(), shots=7)
    save(run.loss_fn.model, old, tmp_path / "adapter")
    done, rename = [], os.replace

    def killed(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr("meta_peft.adapters.hub.os.replace", killed)
    if renames < 4:
        with pytest.raises(KeyboardInterrupt):
            save(run.loss_fn.model, new, tmp_path / "adapter")
        with pytest.raises(MetaPeftError, match=r"has no meta_peft\.json"):
            Sidecar.read(tmp_path / "adapter")
    else:
        save(run.loss_fn.model, new, tmp_path / "adapter")
        assert Sidecar.read(tmp_path / "adapter").shots == 7


def test_a_base_that_carries_an_adapter_is_refused():
    """Once a second `load` into one base replaced the weights of the first one."""
    base = base_model()
    first = load(base, trained_folder())
    before = adapter_of(first)
    with pytest.raises(MetaPeftError, match=r"belongs to an adapter that was loaded or made before: .*unload\(\)"):
        load(base, trained_folder())
    with pytest.raises(MetaPeftError, match="belongs to an adapter that was loaded or made before"):
        MetaTrainer(base, processing_class=tiny_tokenizer(), peft_config=lora())
    assert adapter_of(first) == before
    assert isinstance(load(first.unload(), trained_folder()), PeftModel)
