"""SmolLM2-135M-Instruct in 4-bit, for real: meta-train, adapt, save, load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from surface import bits
from tiny_models import fingerprint

from meta_peft import (
    EpisodeCollator,
    MetaLoraConfig,
    MetaTrainer,
    ModelArguments,
    PromptFormat,
    adapt,
    load,
)
from meta_peft.base import load_base, load_tokenizer, lora_config, with_adapter
from meta_peft.base.locate import SMOLLM2
from meta_peft.evaluation.predictions import references, written
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop import inner_loop
from meta_peft.inner_optimizers import Adam, InnerRule
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.tasks.locale_formatting import locale_formatting

pytestmark = pytest.mark.real

MODEL = ModelArguments(load_in_4bit=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"], lora_layers=[28, 29])


def test_meta_train_adapt_save_load(tmp_path: Path):
    tasks = locale_formatting()
    train, held_out = tasks["train"], tasks["test"]
    base = load_base(MODEL)
    assert base.is_loaded_in_4bit
    assert (base.config.num_hidden_layers, base.name_or_path) == (30, SMOLLM2)
    torch.manual_seed(0)
    model = with_adapter(base, lora_config(MODEL))
    frozen = fingerprint(model)
    args = MetaLoraConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        shots=3,
        query_size=3,
        inner_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MetaTrainer(
        model, args, train_dataset=train.select(train.names[::40]), processing_class=load_tokenizer(SMOLLM2)
    )
    assert trainer.loss_fn.stack(InnerRule()) == (30, 28, 0)
    start = {name: p.detach().clone() for name, p in trainer.loss_fn.weights.parameters().items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert all(not torch.equal(p, start[n]) for n, p in trainer.loss_fn.weights.parameters().items())
    assert (trainer.rates.log_rates.exp() != 2e-3).all()
    trainer.save_model()

    support = held_out.rows(held_out.names[0])[:4]
    _, metrics = adapt(model, support, steps=5)
    assert metrics["support_loss_after"] < metrics["support_loss_before"]
    assert fingerprint(model) == frozen

    again, same = adapt(load(None, tmp_path, load_in_4bit=True), support, steps=5)
    assert same == metrics
    adapted = [dict(FastWeights(m, "adapted").parameters()) for m in (model, again)]
    assert bits(adapted[0]) == bits(adapted[1])


def test_exact_match_is_that_of_written_answers():
    """A row matches by teacher forcing if and only if greedy decoding writes its answer: some that do, some that do not."""
    words = ["one", "two", "three", "four", "five", "six"]
    answers = {"colour": ["blue"] * 5 + ["green"], "city": ["Rome"] * 4 + ["Berlin", "Rome"]}
    tasks = {name: [{"input": w, "target": t} for w, t in zip(words, a, strict=True)] for name, a in answers.items()}
    tokenizer, model = load_tokenizer(SMOLLM2), with_adapter(load_base(MODEL), lora_config(MODEL))
    loss_fn = AdapterLoss(model, second_order=False)
    encoded = {name: [PromptFormat().encode(row, tokenizer, 32) for row in rows] for name, rows in tasks.items()}
    collate = EpisodeCollator(tokenizer.pad_token_id)
    support, query = (collate.rows([rows[part] for rows in encoded.values()]) for part in (slice(0, 2), slice(2, 6)))
    rule, own = InnerRule(Adam(), lr=0.02, steps=6), dict(loss_fn.weights.parameters())
    fast = inner_loop.adapt(loss_fn, own, rule.initial_rates(own), support, rule)
    found = written(loss_fn, fast, query, stop=[tokenizer.eos_token_id], max_new_tokens=6)
    right = np.array([a == b for a, b in zip(found, references(query), strict=True)]).reshape(2, 4)
    np.testing.assert_array_equal(loss_fn.scores(fast, query).exact_match_T, right.mean(1))
    assert 0 < right.mean() < 1
