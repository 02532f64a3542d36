"""Tiny classifiers whose head is fast, and rows for them; in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, in_float64
from kinds import HEAD, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from surface import temporary_folder
from tiny_models import VOCAB, random_rows, randomise
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from meta_peft.types import Rows

CLASSES = 3


@dataclass(frozen=True)
class Case:
    kind: str
    targets: tuple[str, ...]
    head: tuple[str, ...]
    tokens: bool = False


CASES = {
    "bert": Case("bert", ("query", "dense"), ("classifier.weight", "classifier.bias")),  # with LoRA on the pooler
    "roberta": Case(
        "roberta",
        ("value", "query"),
        tuple(f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")),
    ),
    "distilbert": Case(
        "distilbert",
        ("q_lin", "lin2"),
        tuple(f"{layer}.{part}" for layer in ("pre_classifier", "classifier") for part in ("weight", "bias")),
    ),
    "llama": Case("llama", ("q_proj", "down_proj"), ("score.weight",)),
    "bert, tokens": Case("bert", ("query", "dense"), ("classifier.weight", "classifier.bias"), tokens=True),
}


def model_of(case: str, **options: Any) -> PeftModel:
    how = CASES[case]
    sizes = ARCHITECTURES[how.kind].sizes | dict.fromkeys(ARCHITECTURES[how.kind].layers, 2)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_labels": CLASSES}
    torch.manual_seed(0)
    auto = AutoModelForTokenClassification if how.tokens else AutoModelForSequenceClassification
    base = auto.from_config(AutoConfig.for_model(how.kind, vocab_size=VOCAB, **special, **sizes), dtype=torch.float64)
    for parameter in base.parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.data = 0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise
    in_float64(base)
    task_type = "TOKEN_CLS" if how.tokens else "SEQ_CLS"
    options = {"target_modules": list(how.targets), "r": 2, "lora_alpha": 4, "task_type": task_type} | options
    model = get_peft_model(base, LoraConfig(**options))
    randomise(model)
    return model


def rows_of(case: str, n_tasks: int = 2, per_task: int = 2, seed: int = 0) -> Rows:
    rows = random_rows(n_tasks, per_task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if CASES[case].tokens:
        classes = torch.randint(CLASSES, rows.labels_BL.shape, generator=generator)
        return Rows(rows.inputs, classes.where(rows.labels_BL != -100, -100), n_tasks)
    return Rows(rows.inputs, torch.randint(CLASSES, (n_tasks * per_task, 1), generator=generator), n_tasks)


@cache
def learned() -> Path:
    """The folder of a meta-learned adapter with a head."""
    where = temporary_folder() / "meta"
    run = trainer(HEAD, where, max_steps=1)
    run.train()
    run.save_model()
    return where
