"""Every kind of model, whole: train, evaluate, save, load, adapt, and the adapter in stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kinds import KINDS, arguments, folder, processor, rows, trainer
from peft import PeftModel

import meta_peft
from meta_peft.base_model import load_base
from meta_peft.fast_weights import FastWeights
from meta_peft.model_kinds import auto_class
from meta_peft.sidecar import Sidecar


@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_stock_peft(kind: str, tmp_path: Path):
    run = trainer(kind, tmp_path / "meta", inner_steps=2)
    run.train()
    assert {"eval_loss_before", "eval_loss", "eval_exact_match"} <= run.evaluate().keys()
    run.save_model()
    learned = {n: p.detach().clone() for n, p in run.loss_fn.weights.parameters().items()}

    sidecar = Sidecar.read(tmp_path / "meta")
    assert (sidecar.objective, sidecar.facts) == (KINDS[kind].objective, run.encoding.facts)
    model = meta_peft.load(None, tmp_path / "meta")  # the adapter names base, objective and classes
    assert all(torch.equal(p, learned[n]) for n, p in FastWeights(model).parameters().items())

    support = {"one": rows(kind, "g", 3), "other": rows(kind, "h", 3)}
    adapted = meta_peft.adapt_many(model, support)
    for result in adapted.values():
        assert result.metrics["support_loss_after"] < result.metrics["support_loss_before"]
        assert all(value.isfinite().all() for value in result.weights.values())
        moved = [n for n, value in result.weights.items() if not torch.equal(value, learned[n])]
        assert moved == list(learned)
    adapted["other"].save(tmp_path / "adapted")
    batch = model.meta_peft.encoding.collator().rows(
        [[model.meta_peft.encoding.of_task(support["other"])(row) for row in support["other"]]]
    )
    model, metrics = meta_peft.adapt(model, support["other"], name="again")
    assert metrics["support_loss_after"] == pytest.approx(adapted["other"].metrics["support_loss_after"], rel=1e-4)

    objective, n = KINDS[kind].objective, KINDS[kind].num_labels
    base = auto_class(objective).from_pretrained(folder(kind), **({"num_labels": n} if n else {}))
    if objective == "sequence_classification":
        base.config.pad_token_id = 2
    stock = PeftModel.from_pretrained(base, tmp_path / "adapted").eval()
    FastWeights(model, "again").load_(adapted["other"].weights)
    with torch.no_grad():
        mine, theirs = (m.eval()(**batch.inputs).logits for m in (model, stock))
    assert torch.equal(mine, theirs)
    assert not torch.equal(stock.get_base_model()(**batch.inputs).logits, base_logits(kind, batch.inputs))


def base_logits(kind: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    base = load_base(arguments(kind)).eval()
    base.config.pad_token_id = base.config.pad_token_id if base.config.pad_token_id is not None else 2
    with torch.no_grad():
        return base(**inputs).logits


@pytest.mark.parametrize("kind", [kind for kind, how in KINDS.items() if how.num_labels])
def test_names_of_classes_lie_beside_the_adapter(kind: str, tmp_path: Path):
    run = trainer(kind, tmp_path / "meta")
    run.attach()
    (result,) = meta_peft.adapt_many(run.loss_fn.model, {"a": rows(kind, "g", 3)}).values()
    result.save(tmp_path / "adapted")
    names = json.loads((tmp_path / "adapted" / "label_names.json").read_text())
    expected = ["x", "y", "z"] if KINDS[kind].objective == "token_classification" else ["no", "yes"]
    assert [names["id2label"][str(i)] for i in range(len(expected))] == expected
    assert names["label2id"] == {name: i for i, name in enumerate(expected)}


def test_a_processor_is_needed_where_sound_is_heard():
    assert type(processor("speech_seq2seq")).__name__ == "WhisperProcessor"
