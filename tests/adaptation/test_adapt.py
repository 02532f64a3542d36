from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from surface import (
    base_model,
    bits,
    letter_rows,
    logits_of_stock_peft,
    lora,
    peft_model,
    stock_logits,
    tiny_folder,
    trained_folder,
)
from tiny_models import assert_equal, fingerprint

from meta_peft import MetaPeftError, adapt, adapt_folder, adapt_many, load
from meta_peft.adapters.hub import MetaLearned
from meta_peft.frozen.linear import COPY
from meta_peft.functional import adapter_loss
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.tasks import EpisodeCollator
from meta_peft.tasks.row_form import RowForm


@pytest.fixture
def model() -> PeftModel:
    return load(None, trained_folder())


def adapter_of(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in FastWeights(model, name).parameters().items()}


def with_sidecar(model: PeftModel, **changes) -> PeftModel:
    learned = model.meta_peft
    model.meta_peft = MetaLearned(replace(learned.sidecar, **changes), learned.tokenizer, learned.adapter)
    return model


SUPPORT = letter_rows("p")[:3]


# ---- rows in the form that training took them in

RENAMED = RowForm({"word": "input", "answer": "target"})
OLD_NAMES = [{"word": row["input"], "answer": row["target"]} for row in SUPPORT]


def test_rows_with_the_names_that_training_changed(model: PeftModel):
    expected = adapt_many(model, {"a": SUPPORT})["a"]
    with_sidecar(model, row_form=RENAMED)
    for rows in (OLD_NAMES, SUPPORT, Dataset.from_list(OLD_NAMES)):
        assert bits(adapt_many(model, {"a": rows})["a"].weights) == bits(expected.weights)
    assert adapt(model, OLD_NAMES)[1] == expected.metrics


def test_translations_where_training_read_some(model: PeftModel):
    expected = adapt_many(model, {"a": SUPPORT})["a"]
    rows = [{"translation": {"en": row["input"], "de": row["target"]}} for row in SUPPORT]
    with pytest.raises(MetaPeftError, match=r"Row 1 of task 'a' cannot be read\. Expected columns"):
        adapt_many(model, {"a": rows})
    with_sidecar(model, row_form=RowForm(translation=True, target_lang="de"))
    assert bits(adapt_many(model, {"a": rows})["a"].weights) == bits(expected.weights)
    with_sidecar(model, row_form=RowForm(translation=True))
    with pytest.raises(MetaPeftError, match="in the directions de-en and en-de, each of which is a task"):
        adapt_many(model, {"a": rows})


def test_a_row_that_lacks_a_column_is_named(model: PeftModel):
    rows = [*SUPPORT, {"input": "abc"}]
    with pytest.raises(
        MetaPeftError, match=r"Row 4 of task 'a' has no column 'target', which row 1 has: .*\['input'\]"
    ):
        adapt_many(model, {"a": rows})


# ---- one task


def test_adapt_gives_a_peft_model_with_a_new_active_adapter(model: PeftModel):
    before, frozen = adapter_of(model), fingerprint(model)
    adapted, metrics = adapt(model, SUPPORT)
    assert adapted is model
    assert isinstance(adapted, PeftModel)
    assert adapted.active_adapters == ["adapted"]
    assert bits(adapter_of(model)) == bits(before)
    assert fingerprint(model) == frozen
    assert all(not torch.equal(new, before[n]) for n, new in adapter_of(model, "adapted").items())
    assert metrics["steps"] == 3
    assert metrics["support_loss_after"] < metrics["support_loss_before"]
    assert 0 <= metrics["support_exact_match_after"] <= 1


def test_metrics_are_those_of_an_ordinary_forward(model: PeftModel):
    """The support losses, computed by PEFT's forward with one adapter after the other switched on."""
    adapted, metrics = adapt(model, SUPPORT, steps=2)
    learned = model.meta_peft
    encoded = [learned.sidecar.prompt_format.encode(row, learned.tokenizer, 32) for row in SUPPORT]
    rows = EpisodeCollator(learned.tokenizer.pad_token_id).rows([encoded])
    for name, key in (("default", "support_loss_before"), ("adapted", "support_loss_after")):
        adapted.set_adapter(name)
        with torch.no_grad():
            loss = adapted(**rows.inputs, labels=rows.labels_BL).loss
        assert metrics[key] == pytest.approx(float(loss), abs=1e-5)


def test_an_adapted_model_answers(model: PeftModel):
    """What the metrics say is what `generate` writes."""
    model, metrics = adapt(model, SUPPORT, steps=40)
    assert metrics["support_exact_match_after"] == 1
    tokenizer = model.meta_peft.tokenizer
    for row in SUPPORT:
        prompt = torch.tensor([[0, *tokenizer(f"{row['input']} ->").input_ids]])
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
        assert tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True) == " pp"


def test_each_call_starts_from_the_meta_learned_adapter(model: PeftModel):
    _, first = adapt(model, SUPPORT)
    weights = adapter_of(model, "adapted")
    _, other = adapt(model, letter_rows("m")[:2], name="other")
    assert model.active_adapters == ["other"]
    _, again = adapt(model, SUPPORT)
    assert model.active_adapters == ["adapted"]
    assert again == first != other
    assert bits(adapter_of(model, "adapted")) == bits(weights)
    assert set(model.peft_config) == {"default", "adapted", "other"}


def test_two_tasks_under_one_name(model: PeftModel):
    adapt(model, SUPPORT)
    adapt(model, letter_rows("m")[:2])
    twice = adapter_of(model, "adapted")
    fresh, _ = adapt(load(None, trained_folder()), letter_rows("m")[:2])
    assert bits(twice) == bits(adapter_of(fresh, "adapted"))


def test_no_steps_are_the_meta_learned_adapter(model: PeftModel):
    before = adapter_of(model)
    model, metrics = adapt(model, SUPPORT, steps=0)
    assert bits(adapter_of(model, "adapted")) == bits(before)
    assert metrics["support_loss_before"] == metrics["support_loss_after"]
    assert metrics["steps"] == 0


def test_support_may_be_any_iterable_and_form(model: PeftModel):
    _, rows = adapt(model, SUPPORT)
    _, generated = adapt(model, (row for row in SUPPORT))
    named = [{"text": row["input"], "label": row["target"]} for row in SUPPORT]
    prompts = [{"prompt": f"{row['input']} ->", "completion": f" {row['target']}"} for row in SUPPORT]
    assert rows == generated == adapt(model, named)[1] == adapt(model, prompts)[1]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base(kind: str):
    model = load(base_model(kind), trained_folder())
    frozen = fingerprint(model)
    _, metrics = adapt(model, SUPPORT)
    assert metrics["support_loss_after"] < metrics["support_loss_before"]
    assert fingerprint(model) == frozen
    stock_logits(model)  # an ordinary forward in between changes nothing
    assert adapt(model, SUPPORT)[1] == metrics


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_kept_copies_of_weights_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = load(base_model(kind), trained_folder())
    with_copies = adapt_many(model, {"one": SUPPORT})["one"]
    assert not any(COPY in module.__dict__ for module in model.modules())
    monkeypatch.setattr(adapter_loss, "ROOM", 0.0)
    without = adapt_many(model, {"one": SUPPORT})["one"]
    assert all(torch.equal(with_copies.weights[name], value) for name, value in without.weights.items())


# ---- rates


def test_the_rate_factor_of_the_number_of_steps_is_used(model: PeftModel):
    """A factor of 2 for two steps is what doubled rates are."""
    sidecar = model.meta_peft.sidecar
    plain = adapter_of(adapt(model, SUPPORT, steps=2)[0], "adapted")
    with_sidecar(model, rate_factors={2: 2.0, 3: 1.0})
    scaled = adapter_of(adapt(model, SUPPORT, steps=2)[0], "adapted")
    third = adapter_of(adapt(model, SUPPORT, steps=3)[0], "adapted")
    with_sidecar(model, rate_factors={}, log_rates=sidecar.log_rates + torch.tensor(2.0).log())
    doubled = adapter_of(adapt(model, SUPPORT, steps=2)[0], "adapted")
    assert_equal(scaled, doubled, 1e-5)
    assert any((scaled[n] - plain[n]).abs().max() > 1e-3 for n in plain)
    with_sidecar(model, log_rates=sidecar.log_rates)
    assert bits(adapter_of(adapt(model, SUPPORT, steps=3)[0], "adapted")) == bits(third)


def test_each_matrix_moves_by_its_own_rate(model: PeftModel):
    rates = torch.full_like(model.meta_peft.sidecar.log_rates, -torch.inf)
    rates[:, 5] = -3.0
    with_sidecar(model, log_rates=rates)
    adapt(model, SUPPORT, steps=2)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(*(adapter_of(model, n).values() for n in ("default", "adapted")), strict=True)
    ]
    assert moved == [i == 5 for i in range(16)]


# ---- many tasks

# Different numbers of rows, in an order that is not that of the stacks; words of one length, except in "long".
MANY = {
    "p": letter_rows("p")[:2],
    "m": letter_rows("m")[:3],
    "n": letter_rows("n")[:2],
    "one": letter_rows("o")[:1],
    "long": [{"input": "abcdefg", "target": "ab"}, {"input": "a", "target": "abcd"}],
    "k": letter_rows("k")[:3],
}


@pytest.mark.parametrize("size", [1, 2, 8])
def test_many_are_one_by_one(model: PeftModel, size: int):
    done = []
    before = adapter_of(model)
    many = adapt_many(model, MANY, tasks_per_forward=size, progress=done.append)
    assert list(many) == list(MANY)
    assert sum(done) == 6
    assert max(done) == min(size, 3)
    assert bits(adapter_of(model)) == bits(before)
    assert model.active_adapters == ["default"]
    assert set(model.peft_config) == {"default"}
    for name, rows in MANY.items():
        single, metrics = adapt(model, rows)
        model.set_adapter("default")
        assert_equal(many[name].weights, adapter_of(single, "adapted"), 5e-5)
        assert many[name].metrics == pytest.approx(metrics, abs=1e-5)


def test_many_leave_another_adapter_active_and_what_is_trained(model: PeftModel):
    adapt(model, SUPPORT)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    first = adapt_many(model, {"m": MANY["m"]})["m"]
    assert model.active_adapters == ["adapted"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    model.set_adapter("default")
    assert bits(first.weights) == bits(adapt_many(model, {"m": MANY["m"]})["m"].weights)


def test_where_memory_runs_out_fewer_go_at_once_and_none_is_left_out(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tasks = {letter: letter_rows(letter)[:2] for letter in "ponml"}
    expected = adapt_many(model, tasks, tasks_per_forward=1)
    measured, most = AdapterLoss._measured, 2

    def little_memory(self, measure, adapter, rows):
        if rows.n_tasks > most:
            raise MemoryError
        return measured(self, measure, adapter, rows)

    monkeypatch.setattr(AdapterLoss, "_measured", little_memory)
    found = adapt_many(model, tasks, tasks_per_forward=5)
    assert list(found) == list(tasks)
    for name, result in expected.items():
        assert_equal(found[name].weights, result.weights, 1e-4)
    assert "Memory ran out with 5 tasks at once; going on with 2 of them." in caplog.text
    most = 0
    with pytest.raises(MetaPeftError, match=r"Memory ran out on task '.' alone"):
        adapt_many(model, tasks)


def test_no_tasks(model: PeftModel):
    assert adapt_many(model, {}) == {}


def test_saved_adapters_load_in_stock_peft(tmp_path: Path):
    folders, ours = {}, {}
    for kind in ("dense", "4bit"):
        model = load(base_model(kind), trained_folder())
        folders[kind] = tmp_path / kind
        adapt_many(model, {"p": SUPPORT, "m": MANY["m"]})["p"].save(folders[kind])
        written = {path.name for path in folders[kind].iterdir()}
        assert written == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        written = json.loads((folders[kind] / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(tiny_folder())
        adapted, _ = adapt(model, SUPPORT)
        FastWeights(adapted, "adapted").load_(adapt_many(model, {"p": SUPPORT, "m": MANY["m"]})["p"].weights)
        ours[kind] = stock_logits(adapted)
    theirs = logits_of_stock_peft(folders, tmp_path / "logits.safetensors")
    assert bits(theirs) == bits(ours)


# ---- errors


def test_a_model_without_a_sidecar():
    with pytest.raises(MetaPeftError, match="carries no meta-learned adapter"):
        adapt(peft_model(), SUPPORT)
    with pytest.raises(MetaPeftError, match="carries no meta-learned adapter"):
        adapt_many(base_model(), {"p": SUPPORT})


def test_empty_support(model: PeftModel):
    with pytest.raises(MetaPeftError, match="Task 'adapted' has no support rows"):
        adapt(model, [])
    with pytest.raises(MetaPeftError, match="Task 'm' has no support rows"):
        adapt_many(model, {"p": SUPPORT, "m": []})
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["default", "a.b", ""])
def test_bad_names(model: PeftModel, name: str):
    with pytest.raises(MetaPeftError, match="is empty, taken by the meta-learned adapter or has a dot: choose another"):
        adapt(model, SUPPORT, name=name)


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_names_that_are_no_texts(model: PeftModel, name):
    with pytest.raises(MetaPeftError, match="name must be a text, what the new adapter is to be called; got"):
        adapt(model, SUPPORT, name=name)


@pytest.mark.parametrize("tasks", [[SUPPORT], SUPPORT, None, "tasks.jsonl"])
def test_tasks_without_names(model: PeftModel, tasks):
    with pytest.raises(
        MetaPeftError, match=r"tasks must be a mapping of task names to rows, .*; got (list|NoneType|str)\."
    ):
        adapt_many(model, tasks)


def test_numbers_of_numpy(model: PeftModel, tmp_path: Path):
    numbers = {"steps": np.int64(2), "tasks_per_forward": np.int32(1)}
    found = adapt_many(model, {"t": SUPPORT}, **numbers)["t"]
    assert bits(found.weights) == bits(adapt_many(model, {"t": SUPPORT}, steps=2)["t"].weights)
    assert json.loads(json.dumps(found.metrics))["steps"] == 2
    adapt_folder(model, {"t": SUPPORT}, tmp_path, **numbers)
    assert adapt_folder(model, {"t": SUPPORT}, tmp_path, steps=2).already == 1


def test_a_name_that_torch_has(model: PeftModel):
    with pytest.raises(MetaPeftError, match="name='keys' is taken by torch"):
        adapt(model, SUPPORT, name="keys")


@pytest.mark.parametrize("steps", [-1, -10])
def test_negative_steps(model: PeftModel, steps: int):
    with pytest.raises(MetaPeftError, match=f"steps must be a whole number from 0 to 1000000; got {steps}"):
        adapt(model, SUPPORT, steps=steps)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "b"}, r"Expected columns prompt \+ completion, .*the columns are \['a'\]"),
        ({"input": "", "target": "b"}, "Column 'input' is empty"),
        ({"input": "a", "target": "b" * 40}, "does not fit max_length=32"),
    ],
)
def test_rows_that_cannot_be_read(model: PeftModel, row: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        adapt(model, [*SUPPORT, row])
    assert set(model.peft_config) == {"default"}


def test_an_error_while_adapting_leaves_the_model_as_it_was(model: PeftModel):
    adapt(model, SUPPORT)

    def fails(tasks: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        adapt_many(model, MANY, progress=fails)
    assert model.active_adapters == ["adapted"]
    AdapterLoss(model, second_order=False)  # still a model that passes every check


# ---- rows as they come


def test_classes_of_a_dataset_are_adapted_on_by_their_names():
    """As they are learned; once their numbers were."""
    names = ["z", "a"]
    rows = [{"text": row["input"], "label": i % 2} for i, row in enumerate(SUPPORT)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    named = [{**row, "label": names[row["label"]]} for row in rows]
    dataset = Dataset.from_list(rows, features=features)
    want = adapt_many(load(None, trained_folder()), {"t": named})["t"]
    for given in (dataset, dataset.to_iterable_dataset()):
        got = adapt_many(load(None, trained_folder()), {"t": given})["t"]
        assert bits(got.weights) == bits(want.weights)


@pytest.mark.parametrize("support", [SUPPORT[0], "rows.jsonl", ["ab", "cd"], [("ab", "cd")], 3])
def test_what_is_no_list_of_rows_is_said_to_be_none(model: PeftModel, support):
    with pytest.raises(MetaPeftError, match=r"rows of a task|do not make a table|Expected tasks"):
        adapt(model, support)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_adapting_where_no_gradients_are_kept(model: PeftModel, mode):
    """As servers run."""
    want = adapt_many(load(None, trained_folder()), {"t": SUPPORT})["t"]
    with mode():
        got = adapt_many(model, {"t": SUPPORT})["t"]
        _, metrics = adapt(model, SUPPORT)
    assert bits(got.weights) == bits(want.weights)
    assert metrics == want.metrics


def test_an_adapter_of_somebody_else_is_not_written_over(model: PeftModel):
    """One with another scale would get matrices that mean something else in it."""
    model.add_adapter("german", lora(lora_alpha=64))
    with pytest.raises(MetaPeftError, match="an adapter 'german' already, with another LoRA config"):
        adapt(model, SUPPORT, name="german")
    adapt(model, SUPPORT, name="mine")
    adapt(model, SUPPORT, name="mine")  # its own it may


@pytest.mark.parametrize(
    "options", [{"steps": 2.5}, {"steps": "2"}, {"steps": True}, {"tasks_per_forward": 0}, {"steps": -1}]
)
def test_numbers_that_are_none(model: PeftModel, options: dict):
    with pytest.raises(MetaPeftError, match="must be a whole number from"):
        adapt_many(model, {"t": SUPPORT}, **options)


def test_a_folder_of_a_meta_learned_adapter_is_not_written_over(model: PeftModel, tmp_path: Path):
    shutil.copytree(trained_folder(), tmp_path / "mine")
    before = (tmp_path / "mine" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(MetaPeftError, match="holds a meta-learned adapter"):
        adapt_many(model, {"t": SUPPORT})["t"].save(tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == before
