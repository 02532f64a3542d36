"""SmolLM2-135M-Instruct in 4-bit, for real: meta-train, adapt, save, load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import fingerprint
from surface import bits

from meta_peft import MetaLoraConfig, MetaTrainer, ModelArguments, adapt, load
from meta_peft.base_model import SMOLLM2, load_base, load_tokenizer, lora_config, with_adapter
from meta_peft.fast_weights import FastWeights
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
    assert trainer.loss_fn.layers() == (30, 28)
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
