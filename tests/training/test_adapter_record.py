"""What is written with an adapter is put back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from surface import bits, trainer

from meta_peft import MetaPeftError, TaskSet
from meta_peft.adapters.card import CardResults
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.training.adapter_record import ON_THE_CARD, AdapterRecord


def learned(record: AdapterRecord) -> dict[str, bytes]:
    return bits({**record.loss_fn.weights.parameters(), "log_rates": record.rates.log_rates})


@torch.no_grad()
def moved(record: AdapterRecord) -> None:
    for value in (*record.loss_fn.weights.parameters().values(), record.rates.log_rates):
        value.add_(torch.rand_like(value))


def test_saved_and_restored(tmp_path: Path):
    saved, other = (trainer(tmp_path / name).adapter_record for name in ("saved", "other"))
    moved(saved)
    saved.rate_factors, saved.results = {3: 2.0}, CardResults("| a table |")
    saved.save(str(tmp_path / "adapter"), None)
    assert Sidecar.read(tmp_path / "adapter").rate_factors == {3: 2.0}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| a table |" in card
    assert all(f"| `{name}` | " in card for name in ON_THE_CARD)
    assert "`ways`" not in card
    assert learned(other) != learned(saved)
    other.restore(tmp_path / "adapter")
    assert learned(other) == learned(saved)


def test_the_columns_that_named_the_tasks_are_kept(tmp_path: Path):
    """Those of the tasks, which may be others than the options name: where the words that are masked are the tasks."""
    record = trainer(tmp_path).adapter_record
    assert record.sidecar().judged.task_column == ("task",)
    rows = [{"text": f"{word} {i}", "label": word} for word in "abcd" for i in range(4)]
    trainer(tmp_path, tasks=TaskSet.of(rows, "label")).adapter_record.save(str(tmp_path / "adapter"), None)
    assert Sidecar.read(tmp_path / "adapter").judged.task_column == ("label",)


def test_what_does_not_belong_changes_nothing(tmp_path: Path):
    saved = trainer(tmp_path).adapter_record
    saved.save(str(tmp_path / "adapter"), None)
    found = json.loads((tmp_path / "adapter" / "meta_peft.json").read_text())["base"]
    elsewhere = replace(saved, base=replace(saved.base, sizes={**found["sizes"], "hidden_size": 32}))
    more_rates = trainer(tmp_path, inner_steps=2, inner_lr_per_step=True).adapter_record
    moved(more_rates)
    for record, message in (
        (elsewhere, "load the base model the adapter belongs to"),
        (more_rates, "inner_lr_per_step"),
    ):
        before = learned(record)
        with pytest.raises(MetaPeftError, match=message):
            record.restore(tmp_path / "adapter")
        assert learned(record) == before
