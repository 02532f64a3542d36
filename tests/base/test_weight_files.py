from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from surface import base_model, tiny_folder

from meta_peft import ModelArguments
from meta_peft.base import weight_files
from meta_peft.base.weight_files import weights_digest


def test_other_weights_in_the_same_folder_are_told_apart(tmp_path: Path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder(), folder)
    first = weights_digest(ModelArguments(str(folder)))
    shutil.copytree(folder, tmp_path / "copy")
    assert weights_digest(ModelArguments(str(tmp_path / "copy"))) == first, "wherever they are"
    (folder / "adapter_model.safetensors").write_bytes(b"of another model")
    assert weights_digest(ModelArguments(str(folder))) == first
    model = base_model()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data.mul_(1.01)
    model.save_pretrained(folder)
    assert weights_digest(ModelArguments(str(folder))) != first


def test_what_the_hub_has_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch):
    def digest_at(commit: str) -> str:
        with monkeypatch.context() as hub:
            hub.setattr(weight_files, "base_config", lambda args: _Config(commit))
            return weights_digest(ModelArguments("user/name"))

    assert digest_at("1234") == digest_at("1234") != digest_at("5678")


class _Config:
    def __init__(self, commit: str):
        self._commit_hash = commit
