from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meta_peft import SGD, Adam, InnerRule, MetaPeftError, PromptFormat
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.sidecar import JSON, TENSORS, Judged, Sidecar
from meta_peft.tasks.encoding.facts import LABELS, Facts
from meta_peft.tasks.labelling import Labelling
from meta_peft.tasks.row_form import RowForm

SIDECAR = Sidecar(
    algorithm="maml",
    inner=InnerRule(Adam(beta1=0.8, eps_root=1e-7), lr=0.003, steps=2, learn_rates=True, rates_per_step=True),
    names=("a.lora_A.weight", "a.lora_B.weight", "ß.lora_A.weight"),
    log_rates=torch.tensor([[-1.0, -2.0, -math.inf], [0.1, 1e-30, 3.3333333]]),
    prompt_format=PromptFormat("Frage: {input}\n", "→ {target}"),
    max_length=77,
    base=BaseIdentity("some/base", {"hidden_size": 8, "vocab_size": 40}, (0.5, -0.25)),
    shots=3,
    rate_factors={0: 1.0, 3: 2.0, 10: 0.5},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SIDECAR.write(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / JSON).read_text(encoding="utf-8"))
    change(values)
    (folder / JSON).write_text(json.dumps(values), encoding="utf-8")


def assert_same(one: Sidecar, other: Sidecar) -> None:
    """Field by field: tensors have no truth value."""
    for each in fields(Sidecar):
        a, b = getattr(one, each.name), getattr(other, each.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, each.name


@pytest.mark.parametrize("optimizer", [SIDECAR.inner.optimizer, SGD(momentum=0.9), Adam()])
def test_round_trip(tmp_path: Path, optimizer: Adam | SGD):
    written = replace(SIDECAR, inner=replace(SIDECAR.inner, optimizer=optimizer))
    written.write(tmp_path)
    read = Sidecar.read(tmp_path)
    assert_same(read, written)
    assert {path.name for path in tmp_path.iterdir()} == {JSON, TENSORS}


def test_round_trip_of_rates_of_entries_and_of_fast_weights(tmp_path: Path):
    """How many entries there are is known by the adapter alone, see test_hub."""
    inner = replace(SIDECAR.inner, rates_per_entry=True, fast="lora_B", clip=0.5, proximal=1.5)
    written = replace(SIDECAR, inner=inner, log_rates=torch.randn(2, 17))
    written.write(tmp_path)
    read = Sidecar.read(tmp_path)
    assert_same(read, written)


def test_rates_are_those_of_fast_weights_alone(tmp_path: Path):
    one_fast = replace(SIDECAR, inner=replace(SIDECAR.inner, fast="lora_B"), log_rates=torch.zeros(2, 1))
    one_fast.write(tmp_path)
    assert Sidecar.read(tmp_path).inner.fast == "lora_B"
    replace(one_fast, log_rates=torch.zeros(2, 3)).write(tmp_path)
    with pytest.raises(MetaPeftError, match=r"should hold finite rates for 1 matrices; it has shape \[2, 3\]"):
        Sidecar.read(tmp_path)
    replace(one_fast, inner=replace(SIDECAR.inner, fast="lora_C")).write(tmp_path)
    with pytest.raises(MetaPeftError, match="fast_weights='lora_C' is found in the name of no LoRA matrix"):
        Sidecar.read(tmp_path)


def test_a_sidecar_from_before_there_were_fast_weights(folder: Path):
    def forget(values: dict) -> None:
        for name in ("rates_per_entry", "clip", "proximal", "fast"):
            del values["inner"][name]
        del values["inner"]["optimizer"]["weight_decay"]

    edit(folder, forget)
    assert Sidecar.read(folder).inner == SIDECAR.inner


@pytest.mark.parametrize("labels", LABELS)
def test_what_labels_were_in_training(tmp_path: Path, labels: str):
    head = replace(SIDECAR, objective="sequence_classification", facts=Facts(num_labels=3, labels=labels))
    head.write(tmp_path)
    assert Sidecar.read(tmp_path).facts == head.facts
    edit(tmp_path, lambda values: values["facts"].pop("labels"))
    assert Sidecar.read(tmp_path).facts.labels == "unknown", "a sidecar from before it was written down"


JUDGED = Judged("chrf", ("customer", "product"), Labelling(3, "letters", "kind"), 8)


def test_how_tasks_were_judged(tmp_path: Path):
    replace(SIDECAR, judged=JUDGED).write(tmp_path)
    assert Sidecar.read(tmp_path).judged == JUDGED
    edit(tmp_path, lambda values: values.pop("judged"))
    assert Sidecar.read(tmp_path).judged == Judged(), "a sidecar from before it was written down"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "chfr"}, "metric must be one of"),
        ({"metric": 3}, "metric must be one of"),
        ({"task_column": [3]}, "task_column must be a text"),
        ({"labelling": {"ways": 10**9, "words": "given", "column": "kind"}}, "ways must be a whole number"),
        ({"labelling": {"ways": 3, "words": "other", "column": "kind"}}, "label_words must be one of"),
        ({"labelling": {"ways": 3, "words": "given", "column": ""}}, "label_column must be a text"),
        ({"labelling": {"ways": 3}}, "words"),
        ({"labelling": [3]}, "is damaged"),
    ],
)
def test_judged_by_what_cannot_be(tmp_path: Path, changes: dict, message: str):
    replace(SIDECAR, judged=JUDGED).write(tmp_path)
    edit(tmp_path, lambda values: values["judged"].update(changes))
    with pytest.raises(MetaPeftError, match=rf"is damaged or not a sidecar of meta_peft.*{message}|{message}"):
        Sidecar.read(tmp_path)


ROW_FORM = RowForm({"sentence": "text"}, translation=True, source_lang="de")


def test_what_training_did_to_rows(tmp_path: Path):
    replace(SIDECAR, row_form=ROW_FORM).write(tmp_path)
    assert Sidecar.read(tmp_path).row_form == ROW_FORM
    edit(tmp_path, lambda values: values.pop("row_form"))
    assert Sidecar.read(tmp_path).row_form == RowForm(), "a sidecar from before it was written down"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"new_names": ["sentence"]}, "rename_columns must give each column another name"),
        ({"new_names": {"sentence": "\x1b[2J"}}, "rename_columns must be a text"),
        ({"translation": 1}, "translation must be true or false"),
        ({"target_lang": ["en"]}, "target_lang must be a text"),
        (["sentence"], "is damaged"),
    ],
)
def test_a_form_of_rows_that_cannot_be(folder: Path, form: object, message: str):
    edit(folder, lambda values: values.update(row_form=form))
    with pytest.raises(MetaPeftError, match=rf"is damaged or not a sidecar of meta_peft.*{message}|{message}"):
        Sidecar.read(folder)


@pytest.mark.parametrize("missing", [JSON, TENSORS])
def test_missing(folder: Path, missing: str):
    (folder / missing).unlink()
    with pytest.raises(MetaPeftError, match=r"has no meta_peft\.json with meta_peft\.safetensors beside the adapter"):
        Sidecar.read(folder)


@pytest.mark.parametrize("number", [0, 3, "1", True, None])
def test_another_format(folder: Path, number: object):
    edit(folder, lambda values: values.update(format=number))
    with pytest.raises(MetaPeftError, match=f"has format {number!r}; this version of meta_peft reads formats 1 and 2"):
        Sidecar.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '"text"', "\udcff"])
def test_damaged_json(folder: Path, text: str):
    (folder / JSON).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(MetaPeftError, match="is damaged or not a sidecar of meta_peft"):
        Sidecar.read(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("inner"),
        lambda values: values.pop("shots"),
        lambda values: values.update(max_length="long"),
        lambda values: values.update(base=None),
        lambda values: values["base"].pop("embedding"),
        lambda values: values["inner"].update(speed=3),
        lambda values: values["inner"]["optimizer"].pop("name"),
        lambda values: values.update(rate_factors=[1, 2]),
        lambda values: values["prompt_format"].update(suffix=""),
    ],
)
def test_json_that_lacks_something(folder: Path, change: Callable[[dict], object]):
    edit(folder, change)
    with pytest.raises(MetaPeftError, match="is damaged or not a sidecar of meta_peft"):
        Sidecar.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["inner"]["optimizer"].update(name="lion"), "Unknown inner optimizer 'lion'"),
        (lambda values: values["inner"].update(steps=-1), "inner_steps must be 0 or more"),
        (lambda values: values["prompt_format"].update(prompt_template="no place"), r"must contain \{input\}"),
    ],
)
def test_values_that_cannot_be_right(folder: Path, change: Callable[[dict], object], message: str):
    edit(folder, change)
    with pytest.raises(MetaPeftError, match=message):
        Sidecar.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(algorithm="mystery"), "algorithm must be one of maml, .*got 'mystery'"),
        (lambda values: values["inner"].update(steps=10**12), "inner_steps must be 0 or more, got 1000000000000"),
        (lambda values: values["inner"].update(lr=math.nan), "inner_lr must be a finite number"),
        (lambda values: values["inner"].update(learn_rates="yes"), "learn_rates must be true or false"),
        (lambda values: values["inner"].update(fast=3), "fast_weights must be a regular expression"),
        (lambda values: values["inner"].update(fast="(" * 900 + ")" * 900), "is not a regular expression"),
        (lambda values: values["inner"]["optimizer"].update(beta1=1.0), "beta1 must be 0 or more and below 1"),
        (lambda values: values["inner"]["optimizer"].update(eps="x"), "eps must be a number of 0 or more"),
        (lambda values: values.update(names=[]), "names must be those of some LoRA matrices"),
        (lambda values: values.update(names=["../../x"]), "names must be those of LoRA matrices; got"),
        (lambda values: values.update(names=["a.base_layer.weight"]), "names must be those of LoRA matrices"),
        (lambda values: values.update(max_length=0), "max_length must be a whole number from 1"),
        (lambda values: values.update(shots=True), "shots must be a whole number from 1"),
        (lambda values: values.update(rate_factors={"1": 0}), "rate_factors must be positive numbers; got 0"),
        (lambda values: values.update(rate_factors={"1": math.inf}), "rate_factors must be positive numbers; got inf"),
        (lambda values: values["base"].update(name="\x1b[2J"), "base.name must be a text"),
        (lambda values: values["base"].update(sizes={"a": "b"}), "must be a whole number"),
        (lambda values: values["base"].update(embedding=["a"]), "base.embedding must be a list of finite numbers"),
        (lambda values: values["prompt_format"].update(prompt_template=["{input}"]), "must be a text of at most"),
        (lambda values: values["prompt_format"].update(prompt_template="{input}" * 9), "the place for the text, once"),
    ],
)
def test_values_that_somebody_made_up(folder: Path, change: Callable[[dict], object], message: str):
    edit(folder, change)
    with pytest.raises(MetaPeftError, match=rf"is damaged or not a sidecar of meta_peft.*{message}"):
        Sidecar.read(folder)


def test_braces_in_a_template_are_text(folder: Path):
    edit(folder, lambda values: values["prompt_format"].update(prompt_template="{input.__class__} {0} {input}"))
    rendered = Sidecar.read(folder).prompt_format.render({"input": "a", "target": "b"})
    assert rendered[0] == "{input.__class__} {0} a"


def test_rates_for_no_step(folder: Path):
    save_file({"log_rates": torch.zeros(0, 3)}, folder / TENSORS)
    with pytest.raises(MetaPeftError, match="should hold finite rates"):
        Sidecar.read(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_damaged_tensors(folder: Path, content: bytes):
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(MetaPeftError, match="is damaged or not a sidecar of meta_peft"):
        Sidecar.read(folder)


def test_tensors_of_another_name(folder: Path):
    save_file({"rates": torch.zeros(1, 3)}, folder / TENSORS)
    with pytest.raises(MetaPeftError, match="is damaged or not a sidecar of meta_peft"):
        Sidecar.read(folder)


@pytest.mark.parametrize("rates", [torch.zeros(1, 2), torch.zeros(3), torch.zeros(1, 3, 1), torch.zeros(())])
def test_wrong_shapes(folder: Path, rates: torch.Tensor):
    save_file({"log_rates": rates}, folder / TENSORS)
    with pytest.raises(MetaPeftError, match=r"should hold finite rates for 3 matrices; it has shape") as error:
        Sidecar.read(folder)
    assert str(list(rates.shape)) in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rates_that_are_no_numbers(folder: Path, value: float):
    save_file({"log_rates": torch.tensor([[0.0, value, 0.0]])}, folder / TENSORS)
    with pytest.raises(MetaPeftError, match="should hold finite rates"):
        Sidecar.read(folder)


@pytest.mark.parametrize(
    ("steps", "factor"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (9, 2.0), (10, 0.5), (99, 0.5)]
)
def test_rate_factor_of_the_largest_known_number_of_steps(steps: int, factor: float):
    assert SIDECAR.rate_factor(steps) == factor


def test_rate_factor_is_1_where_none_is_known():
    assert replace(SIDECAR, rate_factors={}).rate_factor(3) == 1.0
    assert replace(SIDECAR, rate_factors={5: 3.0}).rate_factor(4) == 1.0
    assert replace(SIDECAR, rate_factors={0: 0.25, 5: 3.0}).rate_factor(4) == 1.0, "of no steps all factors are as good"
