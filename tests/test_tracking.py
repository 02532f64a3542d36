"""What trackers are sent: numbers and pictures, read back from the files that they write."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from surface import EVAL, letter_tasks, run_python, trainer

from meta_peft.tracking import adaptation_picture, peak_memory_gb

NUMBERS = {"train/loss", "train/loss_before", "train/grad_norm", "train/tasks_per_second", "train/peak_memory_gb"}
PICTURES = {"inner_rates", "held_out_tasks"}


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(tmp_path / "out", eval_tasks=letter_tasks(EVAL), report_to=["tensorboard"], logging_steps=1)
    run.train()
    run.evaluate()
    run.callback_handler.call_event("on_train_end", run.args, run.state, run.control)
    found = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = found.Tags()
    assert set(tags["scalars"]) >= NUMBERS
    assert set(tags["images"]) == PICTURES
    assert found.Images("inner_rates")[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers(tmp_path: Path, tracker: str):
    """In a process of its own: each has a home, threads and processes of its own."""
    pytest.importorskip(tracker)
    code = (
        "import sys; from pathlib import Path; from surface import EVAL, letter_tasks, trainer\n"
        f"options = {{'report_to': ['{tracker}'], 'logging_steps': 1}}\n"
        "run = trainer(Path(sys.argv[1]) / 'out', eval_tasks=letter_tasks(EVAL), **options)\n"
        "run.train(); run.evaluate(); print('trained')"
    )
    here = str(Path(__file__).parent)
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path), "HOME": str(tmp_path)}
    assert "trained" in run_python(f"import sys; sys.path.insert(0, {here!r})\n{code}", str(tmp_path), **own)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "out" not in path.relative_to(tmp_path).parts]
    assert any(path.suffix in (".wandb", ".db", ".parquet") for path in written)
    assert any(path.suffix == ".png" for path in written), "pictures"


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


def test_memory_is_counted_in_gigabytes():
    assert 0.05 < peak_memory_gb() < 1000
    assert sys.platform != "linux" or peak_memory_gb() == pytest.approx(_high_water_mark(), rel=0.2)


def _high_water_mark() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
