"""The files of an adapter with a head, which may come from somebody else: no tensor is written over the base's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import learned
from kinds import HEAD, arguments, peft_model, processor, rows
from safetensors.torch import load_file, save_file
from tiny_models import fingerprint

from meta_peft import MetaPeftError, load
from meta_peft.adapters.adapter_files import CONFIG, WEIGHTS
from meta_peft.adapters.sidecar import JSON
from meta_peft.base import load_base
from meta_peft.lora.fast_weights import FastWeights

CLASSIFIER = "base_model.model.classifier.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(learned(), tmp_path / "meta"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, message: str, base: Any = None) -> None:
    """Loading raises, and leaves the base as it was, so that a good adapter then loads."""
    own, base = base is None, base or load_base(arguments(HEAD))
    before = fingerprint(base)
    with pytest.raises(MetaPeftError, match=message):
        load(base, folder, tokenizer=processor(HEAD))
    assert fingerprint(base) == before
    if own:
        assert CLASSIFIER in FastWeights(load(base, learned(), tokenizer=processor(HEAD))).parameters()


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({new if name == old else name: tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    names = json.loads((folder / JSON).read_text())["names"]
    edit(folder / JSON, names=[new if name == old else name for name in names])


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.bert.pooler.dense.weight",
        "base_model.model.bert.embeddings.LayerNorm.weight",
        "base_model.model.classifier.original_module.weight",
        "bert.classifier.weight",
    ],
)
def test_weights_of_the_base_under_the_name_of_a_head(folder: Path, name: str):
    renamed(folder, CLASSIFIER, name)
    refused(folder, "names must be those of LoRA matrices|The head in .* has weights")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": None}, "modules_to_save should be None: nothing else is supported"),
        ({"task_type": None, "modules_to_save": None}, "The head in .* has weights .*classifier"),
        ({"modules_to_save": ["classifier", "dense"]}, r"modules_to_save should be null or some of \('classifier'"),
        ({"modules_to_save": "classifier"}, "modules_to_save should be null or some of"),
        ({"task_type": "QUESTION_ANS", "modules_to_save": None}, "task_type should be one of"),
    ],
)
def test_configs_that_are_refused(folder: Path, changes: dict, message: str):
    edit(folder / CONFIG, **changes)
    refused(folder, message)


def test_a_head_of_other_classes(folder: Path):
    refused(
        folder,
        r"The head in .* has weights .*load the base with the objective",
        load_base(arguments(HEAD, num_labels=5)),
    )


def test_a_base_of_another_kind(folder: Path):
    other = load_base(arguments(HEAD, objective="token_classification"))
    with pytest.raises(MetaPeftError, match="learned for sequence_classification, and BertForTokenClassification"):
        load(other, folder, tokenizer=processor(HEAD))


def test_values_that_are_not_finite(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    tensors[CLASSIFIER][0, 0] = torch.inf
    save_file(tensors, folder / WEIGHTS)
    refused(folder, f"holds {CLASSIFIER} with values that are not finite")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "regression"}, "objective must be one of causal_lm"),
        ({"objective": ["causal_lm"]}, "objective must be one of causal_lm"),
        ({"objective": "causal_lm"}, "names must be those of LoRA matrices"),
        ({"facts": {}}, "is damaged or not a sidecar"),
        ({"facts": None}, "is damaged or not a sidecar"),
        (
            {"facts": {"decoder_prefix": [-1], "num_labels": 3, "label_names": []}},
            "decoder_prefix must be a whole number",
        ),
        ({"facts": {"decoder_prefix": [1] * 65, "num_labels": 3, "label_names": []}}, "decoder_prefix must be a few"),
        (
            {"facts": {"decoder_prefix": [], "num_labels": 10**9, "label_names": []}},
            "num_labels must be a whole number",
        ),
        ({"facts": {"decoder_prefix": [], "num_labels": 3, "label_names": ["\x1b[2J"]}}, "label_names must be a text"),
        ({"facts": {"decoder_prefix": [], "num_labels": 3, "label_names": ["a", "a"]}}, "1 of them different"),
        ({"facts": {"decoder_prefix": [], "num_labels": 1, "label_names": ["a", "b"]}}, "the head has 1 classes"),
        (
            {"facts": {"decoder_prefix": [], "num_labels": 3, "label_names": [], "labels": "number"}},
            "labels must be one of names, numbers, ids, unknown",
        ),
        (
            {"facts": {"decoder_prefix": [], "num_labels": 3, "label_names": [], "more": 1}},
            "is damaged or not a sidecar",
        ),
    ],
)
def test_sidecars_that_are_refused(folder: Path, changes: dict, message: str):
    edit(folder / JSON, **changes)
    refused(folder, message)


def test_the_config_that_is_written_names_each_head_once(folder: Path):
    """PEFT adds the names each time that an adapter is made or loaded."""
    model = load(load_base(arguments(HEAD)), folder, tokenizer=processor(HEAD))
    assert json.loads((folder / CONFIG).read_text())["modules_to_save"] == ["classifier", "score"]
    assert set(model.peft_config["default"].modules_to_save) == {"classifier", "score"}
    assert peft_model(HEAD).peft_config["default"].modules_to_save == ["classifier", "score"]
    assert rows(HEAD, "a", 2)[1]["label"] == "yes"
