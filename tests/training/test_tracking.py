"""What trackers are sent: numbers and pictures, read back from the files that they write."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from surface import EVAL, ROOT, letter_tasks, run_python, trainer

from meta_peft.training.tracking import adaptation_picture, peak_memory_gb, rate_pictures, task_curves
from meta_peft.utils import say_once

NUMBERS = {
    f"train/{name}"
    for name in ("loss", "loss_before", "grad_norm", "rate_grad_norm", "tasks_per_second", "peak_memory_gb")
}
PICTURES = {"inner_rates", "held_out_tasks"}
TRACKERS = {"wandb": {".wandb"}, "trackio": {".db", ".parquet"}}  # and what they write numbers to


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(tmp_path / "out", eval_tasks=letter_tasks(EVAL), report_to=["tensorboard"], logging_steps=1)
    run.train()
    trained = EventAccumulator(str(tmp_path / "events")).Reload()
    assert set(trained.Tags()["images"]) == {"inner_rates"}, "with the last step, before the tracker is closed"
    assert [image.step for image in trained.Images("inner_rates")] == [2]
    metrics = run.evaluate()
    run.callback_handler.call_event("on_train_end", run.args, run.state, run.control)
    found = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = found.Tags()
    for name in ("loss_before", "loss"):
        each = [found.Scalars(f"eval_tasks/say {letter}/{name}")[-1].value for letter in EVAL]
        assert np.mean(each) == pytest.approx(metrics[f"eval_{name}"], rel=1e-5)
    assert set(tags["scalars"]) >= NUMBERS
    assert set(tags["images"]) == PICTURES
    assert found.Images("inner_rates")[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each tracker that is installed, after a run that reports to all of them.

    In a process of its own: each has threads and processes of its own.
    """
    home = tmp_path_factory.mktemp("trackers")
    installed = [tracker for tracker in TRACKERS if find_spec(tracker)]
    for tracker in installed:
        (home / tracker).mkdir()
    code = (
        "import sys; from pathlib import Path; from surface import EVAL, letter_tasks, trainer\n"
        f"options = {{'report_to': {installed}, 'logging_steps': 1}}\n"
        "run = trainer(Path(sys.argv[1]) / 'out', eval_tasks=letter_tasks(EVAL), **options)\n"
        "run.train(); run.evaluate(); print('trained')"
    )
    here = str(ROOT / "tests")
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(home / "wandb"), "TRACKIO_DIR": str(home / "trackio")}
    said = run_python(f"import sys; sys.path.insert(0, {here!r})\n{code}", str(home), HOME=str(home), **own)
    assert "trained" in said
    return home


@pytest.mark.parametrize("tracker", TRACKERS)
def test_other_trackers(tracker: str, request: pytest.FixtureRequest):
    pytest.importorskip(tracker)
    home: Path = request.getfixturevalue("home")
    written = {path.suffix for path in (home / tracker).rglob("*") if path.is_file()}
    assert written & TRACKERS[tracker]
    assert ".png" in written, "pictures"


def test_a_picture_that_cannot_be_drawn_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Trackers may be there without matplotlib."""
    pytest.importorskip("tensorboard")
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(say_once, "_said", set())
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(tmp_path / "out", eval_tasks=letter_tasks(EVAL), report_to=["tensorboard"], logging_steps=1)
    with caplog.at_level("INFO", logger="meta_peft"):
        run.train()
        run.evaluate()
    assert run.state.global_step == 2
    assert caplog.text.count("Trackers get no pictures: The picture needs matplotlib") == 1


def test_no_picture_is_made_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL))
    monkeypatch.setattr(run, "_pictures", lambda: pytest.fail("there is no tracker"))
    run.train()
    run.evaluate()


def test_tasks_before_and_after(tmp_path: Path):
    figure = adaptation_picture(np.array([1.0, 2.0]), np.array([0.5, 1.0]))
    figure.savefig(tmp_path / "tasks.png")
    (points,) = figure.axes[0].collections
    assert points.get_offsets().tolist() == [[1.0, 0.5], [2.0, 1.0]]


def test_rates_of_steps_and_entries():
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1)]
    log_rates = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    each = rate_pictures(names, [6, 6], log_rates)
    assert list(each) == ["inner_rates/step_1", "inner_rates/step_2"]
    shown = each["inner_rates/step_2"].axes[0].images[0].get_array()
    assert shown.ravel().tolist() == pytest.approx((torch.tensor([2.0, 3.0]) / np.log(10)).tolist())
    entries = torch.tensor([[0.0, 2.0, 5.0, 5.0, 5.0]])
    (figure,) = rate_pictures(names, [2, 3], entries).values()
    assert figure.axes[0].images[0].get_array().ravel().tolist() == pytest.approx([1 / np.log(10), 5 / np.log(10)])


def test_more_tasks_than_a_tracker_shows():
    losses = np.arange(101.0)
    assert task_curves([str(i) for i in range(101)], losses, losses) == {}
    assert task_curves(["a"], losses[1:2], losses[:1]) == {"eval_tasks/a/loss_before": 1.0, "eval_tasks/a/loss": 0.0}


def test_memory_is_counted_in_gigabytes():
    assert 0.05 < peak_memory_gb() < 1000
    assert sys.platform != "linux" or peak_memory_gb() == pytest.approx(_high_water_mark(), rel=0.2)


def _high_water_mark() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
