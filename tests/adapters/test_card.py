"""Model cards: their metadata are what the hub reads, and they say what is known and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from surface import tiny_folder, trained_folder

from meta_peft.adapters.card import CardResults, adapted_card, is_hub_id, licence_of, model_card
from meta_peft.adapters.sidecar import Judged, Sidecar
from meta_peft.tasks import Labelling

ROWS = [{"start": "meta-learned LoRA", "steps": k, "exact_match": 0.25 * k} for k in (0, 1, 3)]


def sidecar(base: str = "org/base") -> Sidecar:
    found = Sidecar.read(trained_folder())
    return replace(found, base=replace(found.base, name=base))


def test_metadata():
    results = CardResults("| a table |", ROWS, "exact_match", ["x", "y"], 8, ["org/data"], "results.png")
    card = ModelCard(model_card(sidecar(), "user/mine", results, {"max_steps": 20}))
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("org/base", "adapter")
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("peft", "text-generation", ["org/data"])
    assert data.model_name == "mine"
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in data.eval_results] == [
        ("exact_match", value, "org/data") for value in (0.0, 0.25, 0.75)
    ]
    for said in ("| a table |", "![Curves over adaptation steps](results.png)", "`x`, `y`", "| `max_steps` | 20 |"):
        assert said in card.text
    assert 'meta_peft.load("org/base", "user/mine")' in card.text
    assert 'AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained("user/mine")' in card.text


def test_examples_of_classes_are_of_each_class():
    classes = replace(sidecar(), shots=2, judged=Judged("accuracy", labelling=Labelling(4, "permuted")))
    rows = [{"start": "meta-learned LoRA", "steps": 1, "accuracy": 0.75}]
    card = ModelCard(model_card(classes, None, CardResults("| a table |", rows, "accuracy", ["x"], 8)))
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_name == "accuracy after 1 step on 2 examples of each of 4 classes"
    assert card.text.count("on 2 examples of each of 4 classes") == 1
    assert "on about 2 examples of each of 4 classes" in card.text


def test_a_base_in_a_folder_is_named_without_the_path():
    card = model_card(sidecar(str(tiny_folder())), None)
    data = ModelCard(card).data
    assert data.base_model is None
    assert str(tiny_folder().parent) not in card
    assert f"from which {tiny_folder().name} adapts" in card


@pytest.mark.parametrize(
    ("name", "is_id"), [("org/base", True), ("gpt2", True), ("", False), ("/a/b", False), ("a/b/c", False)]
)
def test_what_an_id_is(name: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert is_hub_id(name) == is_id
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert not is_hub_id("org/base"), "there is a folder of the name"


def test_the_licence_is_that_of_the_bases_own_card(tmp_path: Path):
    assert licence_of(str(tmp_path)) == {}
    assert "is under" not in model_card(sidecar(str(tmp_path)), None)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\nlicense_link: x\n---\n")
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "theirs", "license_link": "x"}
    card = model_card(sidecar(str(tmp_path)), None)
    assert f"{tmp_path.name} is under `theirs`" in card
    assert ModelCard(card).data.license == "other"
    (tmp_path / "README.md").write_text("no metadata")
    assert licence_of(str(tmp_path)) == {}
    assert licence_of("") == licence_of("org/base") == {}


def test_a_card_of_an_adapted_adapter():
    metrics = {"steps": 3, "support_loss_before": 2.0, "support_loss_after": 0.125}
    card = ModelCard(adapted_card("org/base", "causal_lm", metrics, "user/p"))
    assert (card.data.base_model, card.data.pipeline_tag) == ("org/base", "text-generation")
    assert "| support loss after | 0.125 |" in card.text
    assert 'PeftModel.from_pretrained(base, "user/p")' in card.text
    classes = adapted_card("org/base", "sequence_classification", metrics, num_labels=5, label_names=("good", "bad"))
    assert "Classes: `good`, `bad`." in classes
    assert "AutoModelForSequenceClassification.from_pretrained" in classes
    assert "num_labels=5" in classes  # of the head, of which the task has two
    assert "AutoModelForMaskedLM.from_pretrained" in adapted_card("org/base", "masked_lm", metrics)
    assert "AutoModelForSpeechSeq2Seq.from_pretrained" in adapted_card("org/base", "speech_seq2seq", metrics)


def test_a_pattern_does_not_end_a_cell_of_the_table():
    options = {"fast_weights": r"layers\.(28|29)\."}
    assert r"| `fast_weights` | layers\.(28\|29)\. |" in model_card(sidecar(), None, None, options)
