"""The benchmark programs run end to end at tiny sizes: contenders agree, and JSON has what a reader looks for.

Never asserted: a time. One test starts real processes; in the others the contenders run in this one.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import adapt_many  # noqa: E402
import against_cells  # noqa: E402
import agreement  # noqa: E402
import choosing  # noqa: E402
import comparison  # noqa: E402
import contenders  # noqa: E402
import limit  # noqa: E402
import memory  # noqa: E402
import meta_step  # noqa: E402
import peers  # noqa: E402
import products  # noqa: E402
import serving  # noqa: E402
import support_selection  # noqa: E402
import task_sampling  # noqa: E402
import workers  # noqa: E402
import workload  # noqa: E402

from meta_peft.protocol.cells import Cell, Found  # noqa: E402

INSTALLED = [
    name for name in ("learn2learn", "torchopt") if peers.folder().is_dir() and peers.state(name) == "installed"
]
SMALL = workload.Workload(shapes="tiny", tasks=2, support=2, query=2, tokens=8, steps=2)
FACTS = {"command", "commit", "versions", "peers", "threads", "cpu"}


class InProcess:
    """A `workers.Worker` without a process: what it is told to do is done at once."""

    def __init__(self, program: Path, spec: dict[str, Any]):
        load = {comparison.PROGRAM: comparison.load, adapt_many.PROGRAM: adapt_many.load}[program]
        self._served = workers._served(load, {**spec, "threads": torch.get_num_threads(), "malloc": "default"})

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._served[do](**arguments)
        except Exception as error:
            raise workers.WorkerFailed(f"{type(error).__name__}: {error}") from error

    def warm_up(self) -> dict[str, Any]:
        return self._ask("warm_up")

    def run(self) -> dict[str, Any]:
        return self._ask("run")

    def save(self, path: Path) -> None:
        self._ask("save", path=str(path))

    def give_back(self) -> None: ...

    def resident(self) -> int:
        return 0

    def close(self) -> None: ...


@pytest.fixture
def run_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a program's main with a command line and read the JSON it wrote."""

    def run(program: Any, *arguments: str, in_process: bool = True) -> dict[str, Any]:
        output = tmp_path / "output.json"
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments, "--quick", "--output", str(output)])
        if in_process:
            monkeypatch.setattr(workers, "Worker", InProcess)
            monkeypatch.setattr(gc, "collect", lambda: 0)  # a quarter of a second each time, in this large process
        threads = torch.get_num_threads()
        try:
            program.main()
        finally:
            torch.set_num_threads(threads)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        found = json.loads(output.read_text(encoding="utf-8"))
        assert set(found["run"]) >= FACTS
        assert found["program"] == program.__name__
        return found

    return run


@pytest.mark.launch
def test_a_meta_step_with_each_contender_in_a_process_of_its_own(run_program):
    found = run_program(meta_step, "--threads", "1", "--contenders", "plain", in_process=False)
    (row,) = found["rows"]
    assert set(row["contenders"]) == {"ours", "plain"}
    for outcome in row["contenders"].values():
        assert "error" not in outcome, outcome
        assert outcome["threads"] == 1
        assert len(outcome["seconds"]) == 1
        assert outcome["peak_bytes"] > 0
    assert row["agreement"]["ours | plain"]["digits"] >= 4
    assert row["fastest_peer"] == "plain"
    assert row["peer_over_ours"]["ours"]["plain"]["median"] > 0
    assert found["run"]["command"].startswith("python ")


@pytest.fixture(scope="module")
def gradient(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, workload.Workload], Any]:
    """The meta-gradient of a contender, computed once for each workload."""

    @cache
    def folder(base: str) -> Path:
        made = tmp_path_factory.mktemp(base)
        workload.save_base(replace(SMALL, base=base), made)
        return made

    @cache
    def compute(contender: str, work: workload.Workload) -> dict[str, torch.Tensor]:
        model = workload.load_model(work, folder(work.base))
        return contenders.CONTENDERS[contender](model, workload.random_batch(work), work)()

    return compute


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("name", ["plain", "plain_labelled", "learn2learn", "torchopt"])
def test_contenders_compute_the_same(gradient, name: str, order: str, base: str):
    if name in ("learn2learn", "torchopt") and name not in INSTALLED:
        pytest.skip(f"{name} is not installed: python benchmarks/peers.py")
    work = replace(SMALL, order=order, base=base)
    assert agreement.agreement(gradient("ours", work), gradient(name, work))["digits"] >= 4


def test_the_order_shows_in_the_gradient(gradient):
    """Else the comparison of contenders would not see a missing second derivative."""
    second, first = gradient("plain", SMALL), gradient("plain", replace(SMALL, order="first"))
    assert agreement.agreement(first, second)["relative_error"] > 0.01


def test_only_part_of_the_layers_is_adapted():
    work = replace(SMALL, layers="top_third")
    model = workload.load_model(work, None)
    assert {name.split("layers.")[1].split(".")[0] for name in workload.lora_parameters(model)} == {"2"}


def test_a_contender_that_fails_is_recorded_and_the_others_run(run_program, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setitem(contenders.CONTENDERS, "higher", fails)
    (row,) = run_program(meta_step, "--contenders", "plain", "higher")["rows"]
    assert row["contenders"]["higher"]["error"] == "ValueError: no such thing"
    assert row["fastest_peer"] == "plain"
    assert list(row["peer_over_ours"]["ours"]) == ["plain"]


def test_the_setting_of_ours_within_a_peers_memory(run_program):
    found = run_program(meta_step, "--preset", "budget", "--contenders", "plain", "--memory", "unrolled")["budget"]
    assert found["budget_bytes"] == found["alone"]["plain"]["peak_bytes"]
    assert set(found["alone"]) > {"plain"}
    if "problem" not in found:  # at these sizes peaks are noise
        assert found["alone"][found["chosen"]]["peak_bytes"] <= found["budget_bytes"]
        assert found["compared"]["peer_over_ours"][found["chosen"]]["plain"]["median"] > 0


def test_every_preset_is_there_with_its_target():
    import presets

    rows = presets.rows_of(["all", "sweep"], {}, quick=False)
    assert len({row.name for row in rows}) == len(rows) == 6 + 27
    assert [row.target for row in rows[:6]] == [1.5, 2.5, 2.5, 3.0, 3.0, 2.5]
    (changed,) = presets.rows_of(["so_fp32_8x8+8"], {"steps": 2}, quick=False)
    assert changed.workload.steps == 2
    assert changed.target is None  # it belongs to the workload as it was


def test_limit(run_program):
    (row,) = run_program(limit, "--threads", "1", "--preset", "so_nf4_16x2+2")["rows"]
    assert {line["part"] for line in row["products"]} == {"frozen linear", "LoRA", "attention", "head"}
    assert all(line["count"] > 0 and line["gflop"] > 0 for line in row["products"])
    assert row["step_over_roof"]["median"] > 0


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("layers", ["all", "top_third"])
def test_the_products_counted_are_those_that_autograd_runs(order: str, layers: str):
    """With one step, plain autograd runs what is counted, but every position, and logits at all of them."""
    work = replace(SMALL, order=order, layers=layers, steps=1, tasks=1)
    model, batch = workload.load_model(work, None), workload.random_batch(work)
    step = contenders.plain(model, batch, work)
    with FlopCounterMode(display=False) as counter, contenders.attention(SMALL):
        step()  # fused attention is not counted on a CPU, plain products are
    expected = 0.0
    for product, times in products.count(model, batch, work, None, every_position=True).items():
        everywhere = 1.0
        if product.part == "head":
            everywhere = work.tokens * 2 / product.m
        expected += times * product.gflop * everywhere
    assert counter.get_total_flops() / 1e9 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", ["first", "second"])
def test_meta_peft_runs_no_more_products_than_are_counted(order: str):
    """The counter does not see products that are added in place, of LoRA's B: 5 to 15 % at these sizes."""
    work = replace(SMALL, order=order, steps=1, tasks=1)
    model, batch = workload.load_model(work, None), workload.random_batch(work)
    step = contenders.ours(model, batch, work, memory="unrolled")
    with FlopCounterMode(display=False) as counter, contenders.attention(SMALL):
        step()
    expected = sum(times * product.gflop for product, times in products.count(model, batch, work, None).items())
    assert 0.85 * expected < counter.get_total_flops() / 1e9 <= expected


def test_memory(run_program, tmp_path: Path):
    found = run_program(memory, "--contenders", "plain", "--memory", "unrolled", "--tasks_per_forward", "1", "all")
    assert {(p["sweep"], p["steps"], p["contender"]) for p in found["points"]} >= {
        ("steps", 1, "ours memory=unrolled tasks_per_forward=1"),
        ("steps", 2, "plain"),
        ("tasks", 3, "ours tasks_per_forward=all"),
    }
    assert all("error" not in point for point in found["points"])
    assert found["ratios"]["most_frugal_peer"] == "plain"
    for base in ("nf4", "int8"):
        assert found["saved_weights"][base]["ours"]["weight_bytes"] == 0
        assert found["saved_weights"][base]["ours"]["all_bytes"] > 0
    assert found["saved_weights"]["nf4"]["plain"]["weight_bytes"] > 0
    assert (tmp_path / "output.png").stat().st_size > 1000


def test_adapt_many(run_program):
    found = run_program(adapt_many, "--tasks_per_forward", "2")
    assert found["agreement"]["ours tasks_per_forward=2"]["relative_error"] < 1e-3
    assert found["plain_over_ours"]["ours tasks_per_forward=2"]["median"] > 0


@pytest.fixture
def tasks_file(tmp_path: Path) -> str:
    rows = [{"task": f"task {t}", "input": f"{i}", "target": str(t)} for t in range(9) for i in range(8 + t)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_support_selection(run_program, tasks_file: str, tmp_path: Path):
    found = run_program(support_selection, "--tasks", tasks_file)
    assert [row["choice"] for row in found["rows"]] == ["random", "balanced", "diverse", "uncertain"]
    assert len(found["tasks"]) == 3
    assert np.array(found["by_task"]["diverse"]["loss"]).shape == (2, 3)  # seeds, tasks
    for row in found["rows"][1:]:
        low, high = row["loss_interval"]
        assert low <= row["loss_difference"] <= high
        assert row["loss_difference"] == pytest.approx(row["loss"] - found["rows"][0]["loss"])
    assert "| uncertain |" in (tmp_path / "output.md").read_text()


def test_task_sampling(run_program, tasks_file: str):
    samplings = ("uniform", "by_difficulty", "by_gradient_diversity", "curriculum")
    found = run_program(task_sampling, "--tasks", tasks_file, "--seeds", "5", "--samplings", *samplings)
    assert [row["choice"] for row in found["rows"]] == list(samplings)
    assert (found["settings"]["seeds"], found["seeds_done"]) == ([5], 1)


def test_paired_differences():
    """The tasks differ by far more than the choices do: only pairs of the same task show it."""
    tasks = np.linspace(0, 10, 30)
    noise = np.random.default_rng(0).normal(0, 0.01, 30)
    scores = {
        "a": [{"loss": tasks, "exact_match": tasks}] * 2,
        "b": [{"loss": tasks - 0.1 + noise, "exact_match": tasks}],
    }
    one, other = choosing.compared(scores)
    assert "loss_difference" not in one
    assert other["loss_difference"] == pytest.approx(-0.1, abs=0.01)
    assert -0.12 < other["loss_interval"][0] < other["loss_interval"][1] < -0.08
    assert other["exact_match_interval"] == [0, 0]
    assert "| b | 4.899 | -0.101 (-0.104 to -0.098) | 9.90 |" in choosing.table([one, other])


def test_agreement():
    some = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert agreement.agreement(some, some) == {
        "relative_error": 0.0,
        "worst_tensor_error": 0.0,
        "worst_tensor": "a",
        "digits": 16.0,
    }
    found = agreement.agreement({**some, "a": torch.tensor([3.0, 4.05])}, some)
    assert found["relative_error"] == pytest.approx(0.01, rel=1e-5)
    assert found["digits"] == 2.0
    assert agreement.agreement({**some, "b": torch.tensor([0.0, float("nan")])}, some)["digits"] == 0.0
    with pytest.raises(ValueError, match="different names"):
        agreement.agreement({"a": some["a"]}, some)


def test_memory_modes_are_handed_on_where_maml_has_them(monkeypatch: pytest.MonkeyPatch):
    with_modes = make_dataclass("WithModes", [("inner", Any), ("memory", Any, "auto")])
    monkeypatch.setattr(contenders, "MAML", with_modes)
    assert contenders.memory_option("replay") == {"memory": "replay"}
    assert contenders.memory_option(2) == {"memory": 2}
    assert contenders.memory_option(None) == {}
    monkeypatch.setattr(contenders, "MAML", make_dataclass("Without", [("inner", Any)]))
    assert contenders.memory_option("unrolled") == {}
    with pytest.raises(ValueError, match="no memory='replay'"):
        contenders.memory_option("replay")


def test_serving(run_program: Callable[..., dict[str, Any]], tmp_path: Path):
    values = run_program(serving, "--threads", "1", "--loaded", "2", "5")
    assert [(row["adapters"], list(row["batches"])) for row in values["found"]] == [(2, ["1"]), (5, ["1", "4"])]
    assert [len(row["load_seconds"]) for row in values["found"]] == [1, 3], "one is there at first"
    assert len(values["slots"]["put_seconds"]) == 32, "twice as many tasks as slots"
    assert "| 5 |" in (tmp_path / "output.md").read_text()


def test_what_was_measured_elsewhere_against_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By hand: two tasks and seeds, in which a start is ahead by 0.1 and 0.3, 0.3 and 0.5."""
    own = {0: [[0.25, 0.6], [0.25, 0.7]], 1: [[0.25, 0.8], [0.25, 0.9]]}
    for seed, score in own.items():
        cell = Cell(seed, "meta")
        Found(cell, "accuracy", ["a", "b"], [0, 10], [None, 1.0], [], score, [], 10).write(tmp_path)
    episodes = [
        {"seed": seed, "task": task, "accuracy": accuracy}
        for seed, task, accuracy in ((1, "b", 0.4), (0, "a", 0.5), (0, "b", 0.4), (1, "a", 0.5))
    ]
    elsewhere = tmp_path / "setfit.json"
    elsewhere.write_text(json.dumps({"episodes": episodes}))
    words = ["--cells", str(tmp_path), "--starts", "meta"]
    before, after = against_cells.main([str(elsewhere), *words])
    assert (after["start"], after["steps"]) == ("meta", 10)
    assert after["ahead"] == pytest.approx(0.3)
    assert after["by_seed"] == pytest.approx([0.2, 0.4])
    # The lowest of the four, and the highest, are in a sixteenth of the draws of two tasks and two seeds.
    assert after["interval"] == pytest.approx([0.1, 0.5])
    assert before["ahead"] == pytest.approx(0.25 - 0.45)
    assert "| meta | 10 | 75 (70 to 80) | 30 (10 to 50) | 20 to 40 |" in capsys.readouterr().out

    cells = []
    for seed in own:
        Found(Cell(seed, "in_context"), "accuracy", ["a", "b"], [0], [None], [], [[0.5], [0.4]], [], 0).write(
            tmp_path / "x"
        )
        cells.append(str(tmp_path / "x" / "cells" / f"seed{seed}-in_context.json"))
    assert against_cells.main([*cells, *words]) == [before, after]

    elsewhere.write_text(json.dumps({"episodes": episodes[:3]}))
    with pytest.raises(SystemExit, match="has other tasks"):
        against_cells.main([str(elsewhere), *words])
    with pytest.raises(SystemExit, match="give one that adapts nothing"):
        against_cells.main([str(tmp_path / "cells" / "seed0-meta.json"), *words])
