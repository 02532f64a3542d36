"""Every kind of model, whole: train, evaluate, save, load, adapt, and the adapter in stock PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import HEAD, KINDS, arguments, folder, peft_model, processor, rows, tasks, trainer
from peft import PeftModel
from surface import config, write_jsonl

import meta_peft
from meta_peft import MetaPeftError, MetaTrainer, TaskArguments
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.base import load_base
from meta_peft.base.base_config import objective_of
from meta_peft.base.tokenizers import agree_on_padding, load_tokenizer
from meta_peft.comparison.compare import CompareArguments
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.main_job import run


@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_stock_peft(kind: str, tmp_path: Path):
    run = trainer(kind, tmp_path / "meta", inner_steps=2)
    run.train()
    assert {"eval_loss_before", "eval_loss", f"eval_{run.scorer.metric.name}"} <= run.evaluate().keys()
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
    batch = model.meta_peft.encoding.collator().rows(
        [[model.meta_peft.encoding.of_task(support["other"])(row) for row in support["other"]]]
    )
    model, metrics = meta_peft.adapt(model, support["other"], name="again")
    assert metrics["support_loss_after"] == pytest.approx(adapted["other"].metrics["support_loss_after"], rel=1e-4)

    adapted["other"].save(tmp_path / "adapted")
    stock = loaded_as_the_card_says(tmp_path / "adapted")
    if KINDS[kind].objective == "sequence_classification":
        stock.get_base_model().config.pad_token_id = 2
    FastWeights(model, "again").load_(adapted["other"].weights)
    with torch.no_grad():
        mine, theirs = (m.eval()(**batch.inputs).logits for m in (model, stock))
    assert torch.equal(mine, theirs)
    assert not torch.equal(stock.get_base_model()(**batch.inputs).logits, base_logits(kind, batch.inputs))


def loaded_as_the_card_says(adapter: Path) -> PeftModel:
    """By the code in it, which knows nothing of meta_peft."""
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "meta_peft" not in code
    names: dict[str, Any] = {}
    exec(code.replace("path/of/this-adapter", str(adapter)), names)
    return names["model"].eval()


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


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.objective == HEAD])
def test_a_head_goes_with_its_adapter(kind: str, tmp_path: Path):
    """Once the adapter that `adapt` leaves active lent its head to what was evaluated and trained afterwards."""
    learned = trainer(kind, tmp_path, max_steps=2)
    learned.train()
    rows_of_a_task = learned.batches([learned.train_dataset[0]])[0].support
    weights = learned.loss_fn.own()
    before = learned.loss_fn(weights, rows_of_a_task)
    meta_peft.adapt(learned.model, rows(kind, "a"))
    assert learned.model.active_adapters == ["adapted"]
    assert torch.equal(learned.loss_fn(weights, rows_of_a_task), before)


def test_the_main_job(tmp_path: Path):
    """From a config's options to the table, with all three starts; each has the same numbers for the same classes."""
    files = {
        f"{split}_tasks": str(write_jsonl(tmp_path / f"{split}.jsonl", tasks(HEAD, letters)))
        for split, letters in {"train": "abcd", "validation": "ef", "test": "gh"}.items()
    }
    options = {"inner_steps": 1, "eval_query_size": 2, "prompt_template": "{input}"}
    report = run(
        arguments(HEAD),
        TaskArguments(**files),
        config(tmp_path / "out", **options),
        CompareArguments("full", [0, 1], [1.0]),
    )
    assert list(report.curves) == ["plain LoRA", "multi-task LoRA", "meta-learned LoRA"]
    assert report.in_context is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert 'adapt(model, [{"text": "...", "label": "..."}])' in card
    assert Sidecar.read(tmp_path / "out").facts.label_names == ("no", "yes")


def test_names_of_classes_come_with_the_encoding(tmp_path: Path):
    """Numbers that another trainer found, in which a start is to be comparable."""
    own = trainer(HEAD, tmp_path).encoding
    assert own.facts.label_names == ("no", "yes")
    given = replace(own, facts=replace(own.facts, label_names=("yes", "no")))
    run = MetaTrainer(
        peft_model(HEAD), config(tmp_path), train_dataset=tasks(HEAD), processing_class=processor(HEAD), encoding=given
    )
    assert run.sidecar().facts.label_names == ("yes", "no")


def test_tokenizers_and_processors():
    assert type(processor("speech_seq2seq")).__name__ == "WhisperProcessor"
    spanish = load_tokenizer(str(folder("speech_seq2seq")), objective="speech_seq2seq", speech_language="spanish")
    assert "<|es|>" in spanish.tokenizer.convert_ids_to_tokens(spanish.tokenizer("a")["input_ids"])
    with pytest.raises(MetaPeftError, match=r"cannot be loaded: .*klingon"):
        load_tokenizer(str(folder("speech_seq2seq")), objective="speech_seq2seq", speech_language="klingon")
    with pytest.raises(MetaPeftError, match="set_prefix_tokens"):
        load_tokenizer(str(folder(HEAD)), speech_language="spanish")


def test_an_encoder_needs_no_end_of_sequence(tmp_path: Path):
    words = processor(HEAD)
    words.eos_token = None
    words.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), objective=HEAD).eos_token is None
    with pytest.raises(MetaPeftError, match="has no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_what_is_padded_with():
    """A decoder under a head finds the last token of a row by it."""
    base, words = load_base(arguments("head of a decoder")), processor("head of a decoder")
    base.config.pad_token_id = None
    agree_on_padding(base, HEAD, words)
    assert base.config.pad_token_id == 2
    base.config.pad_token_id = 5
    with pytest.raises(MetaPeftError, match=r"pads with token 2, the config of LlamaForSequenceClassification says"):
        agree_on_padding(base, HEAD, words)


@pytest.mark.parametrize("kind", ["seq2seq_lm", "speech_seq2seq", "masked_lm"])
def test_a_config_says_what_its_model_is_for(kind: str):
    assert objective_of(arguments(kind, objective=None)) == KINDS[kind].objective
