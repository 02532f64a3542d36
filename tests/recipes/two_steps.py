"""Start a recipe as a user does, on a tiny model, for two outer steps and a small comparison."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from surface import ROOT

SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--shots", "2", "--query_size", "2"]
SMALL += ["--multitask_warmup_steps", "1"]  # the second one is of the recipe's own algorithm
SMALL += ["--use_cpu", "true", "--logging_steps", "1", "--save_steps", "2", "--disable_tqdm", "true"]
SMALL += ["--adaptation_steps", "0", "1", "--rate_factors", "1", "--eval_query_size", "2"]
SMALL += ["--max_validation_tasks", "1", "--max_test_tasks", "1", "--output_dir", "out"]


def take_two_steps(recipe: str, model: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[float]:
    """The losses; what is saved is in the folder ``out``."""
    path = ROOT / "recipes" / f"{recipe}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--model_name_or_path", str(model), *SMALL, *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    log = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    return [entry["loss"] for entry in log if "loss" in entry]
