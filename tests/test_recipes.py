"""The recipe as users start it, in processes of its own, on the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from surface import EVAL, ROOT, TEST, TRAIN, environment, letter_tasks, tiny_folder, write_jsonl

pytestmark = pytest.mark.launch

ONE = ["--num_processes", "1"]
TWO = ["--multi_gpu", "--num_processes", "2"]  # with ACCELERATE_USE_CPU: two processes that talk over gloo


def write_config(tmp_path: Path) -> Path:
    """Plain gradient descent, inside and outside, which gives the same numbers on other machines and orders of sums."""
    lines = ["max_steps: 2", "shots: 2", "query_size: 2", "inner_steps: 1", "max_length: 32", "lora_r: 4"]
    lines += [
        "optim: sgd",
        "learning_rate: 0.2",
        "inner_optimizer: sgd",
        "inner_lr: 0.1",
        "lr_scheduler_type: constant",
    ]
    lines += ["adaptation_steps: [0, 1]", "rate_factors: [1]", "report_to: none", "use_cpu: true", "logging_steps: 1"]
    lines += ["save_strategy: steps", "save_steps: 2", f"model_name_or_path: {tiny_folder()}"]
    for split, letters in (("train", TRAIN), ("validation", EVAL), ("test", TEST)):
        lines.append(f"{split}_tasks: {write_jsonl(tmp_path / f'{split}.jsonl', letter_tasks(letters))}")
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def launch(processes: list[str], config: Path, output: Path, *options: str) -> list[float]:
    """Run the recipe; returns the loss of each step."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *processes, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "recipes" / "meta_lora.py"), "--config", str(config), "--output_dir", str(output), *options]
    done = subprocess.run(
        command, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(config: Path) -> tuple[Path, list[float]]:
    """The folder and the losses of one process, four tasks an outer step."""
    folder = config.with_name("one")
    return folder, launch(ONE, config, folder, "--per_device_train_batch_size", "4", "--compare", "full")


def assert_same_adapter(one: Path, other: Path, *files: str) -> None:
    for name in files:
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        for key in expected:
            assert (found[key] - expected[key]).abs().max() < 1e-5, key


def test_one_process_gives_the_recorded_loss(alone: tuple[Path, list[float]]):
    assert alone[1] == pytest.approx([2.5624, 1.9914], abs=1e-3)


def test_two_processes_are_one_with_twice_the_tasks(config: Path, alone: tuple[Path, list[float]], tmp_path: Path):
    (one, expected), two = alone, tmp_path / "two"
    losses = launch(TWO, config, two, "--per_device_train_batch_size", "2", "--compare", "full")
    assert losses == pytest.approx(expected, abs=1e-4)
    assert_same_adapter(one, two, "adapter_model.safetensors", "meta_peft.safetensors")
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (one, two)]
    assert [row["start"] for row in rows[0]] == [row["start"] for row in rows[1]]
    assert {row["start"] for row in rows[1]} >= {"plain LoRA", "multi-task LoRA", "meta-learned LoRA"}
    for mine, its in zip(*rows, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], abs=1e-3), mine["start"]


def test_a_base_in_shards_is_one_that_is_whole(config: Path, alone: tuple[Path, list[float]], tmp_path: Path):
    """The launcher's configuration alone shards the base over two processes; the update stays what it was."""
    one, expected = alone
    sharded = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")]
    losses = launch(sharded, config, tmp_path / "shards", "--compare", "none", "--tasks_per_step", "4")
    assert losses == pytest.approx(expected, abs=1e-4)
    assert_same_adapter(one, tmp_path / "shards", "adapter_model.safetensors")
