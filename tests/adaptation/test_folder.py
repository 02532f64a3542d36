"""A folder of adapters from a file of tasks: stopped and gone on with, failures told apart, early stopping."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from surface import base_model, bits, letter_rows, letter_tasks, trained_folder, write_jsonl

from meta_peft import MetaPeftError, adapt_folder, adapt_many, load
from meta_peft.adaptation.folder import Made, folder_names
from meta_peft.adapters.adapter_files import CONFIG, WEIGHTS
from meta_peft.adapters.hub import LABELS, NOTE
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.tasks.row_form import RowForm

TASKS = {"say p": letter_rows("p")[:3], "say m": letter_rows("m")[:3], "say n": letter_rows("n")[:2]}
FOLDERS = {"say_p", "say_m", "say_n"}


@pytest.fixture
def model() -> PeftModel:
    return load(None, trained_folder())


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def times_written(folder: Path) -> dict[str, int]:
    return {path.name: (path / NOTE).stat().st_mtime_ns for path in folder.iterdir()}


def test_each_task_has_the_adapter_that_adapt_many_makes(model: PeftModel, tmp_path: Path):
    seen: list[Made] = []
    result = adapt_folder(model, TASKS, tmp_path / "out", done=seen.append)
    assert (result.made, result.already, result.failed) == (3, 0, {})
    assert {path.name for path in (tmp_path / "out").iterdir()} == FOLDERS
    expected = adapt_many(model, TASKS)
    for made in seen:
        assert made.metrics == expected[made.task].metrics
        assert bits(weights_in(made.folder)) == bits(expected[made.task].weights)
    PeftModel.from_pretrained(base_model(), str(tmp_path / "out" / "say_p"))
    assert model.active_adapters == ["default"]


def test_what_is_there_is_left_alone(model: PeftModel, tmp_path: Path):
    adapt_folder(model, TASKS, tmp_path)
    before = times_written(tmp_path)
    seen: list[Made] = []
    result = adapt_folder(load(None, trained_folder()), TASKS, tmp_path, done=seen.append)
    assert (result.made, result.already) == (0, 3)
    assert all(made.already and made.metrics["steps"] == 3 for made in seen)
    assert times_written(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    ["rows", "steps", "hold_back", "killed", "damaged", "no config", "no weights", "other weights", "earlier version"],
)
def test_what_is_not_what_would_be_made_is_made_again(model: PeftModel, tmp_path: Path, change: str):
    adapt_folder(model, TASKS, tmp_path)
    before, tasks, options = times_written(tmp_path), dict(TASKS), {}
    if change == "rows":
        tasks["say m"] = letter_rows("m")[1:4]
    elif change == "steps":
        options = {"steps": 2}
    elif change == "hold_back":
        options = {"hold_back": 0.4}
    elif change == "killed":  # the note is written last
        (tmp_path / "say_m" / NOTE).unlink()
    elif change == "damaged":
        (tmp_path / "say_m" / NOTE).write_text("{")
    elif change == "no config":
        (tmp_path / "say_m" / CONFIG).unlink()
    elif change == "no weights":
        (tmp_path / "say_m" / WEIGHTS).unlink()
    elif change == "other weights":
        shutil.copy(tmp_path / "say_p" / WEIGHTS, tmp_path / "say_m" / WEIGHTS)
    else:  # which did not say what weights it was of
        note = json.loads((tmp_path / "say_m" / NOTE).read_text())
        del note["weights"]
        (tmp_path / "say_m" / NOTE).write_text(json.dumps(note))
    result = adapt_folder(model, tasks, tmp_path, **options)
    after = times_written(tmp_path)
    changed = {name for name, when in after.items() if when != before.get(name)}
    assert changed == (FOLDERS if options else {"say_m"})
    assert result.made == len(changed)


def test_an_adapter_that_another_call_writes_there_has_none_of_its_notes(model: PeftModel, tmp_path: Path):
    """Once the folder was said to hold what it was first made of, with the metrics of that."""
    adapt_folder(model, TASKS, tmp_path)
    folder = tmp_path / "say_m"
    (folder / LABELS).write_text("{}")  # as of a classifier
    adapt_many(model, {"other": TASKS["say p"]})["other"].save(folder)
    assert not (folder / NOTE).exists()
    assert not (folder / LABELS).exists()
    assert (adapt_folder(model, TASKS, tmp_path).made, bits(weights_in(folder))) == (
        1,
        bits(adapt_many(model, {"say m": TASKS["say m"]})["say m"].weights),
    )


def test_another_start_makes_all_again(model: PeftModel, tmp_path: Path):
    adapt_folder(model, TASKS, tmp_path)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1e-3)
    assert adapt_folder(model, TASKS, tmp_path).made == 3


def test_another_base_of_the_same_sizes_makes_all_again(model: PeftModel, tmp_path: Path):
    adapt_folder(model, TASKS, tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1.1)
    assert adapt_folder(model, TASKS, tmp_path).made == 3


def test_a_task_that_memory_does_not_hold_does_not_stop_the_others(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = AdapterLoss._measured

    def little_memory(self, measure, adapter, rows):
        if rows.labels_BL.shape[0] > 3:
            raise MemoryError
        return measured(self, measure, adapter, rows)

    monkeypatch.setattr(AdapterLoss, "_measured", little_memory)
    result = adapt_folder(model, {"big": letter_rows("o")[:4], **TASKS}, tmp_path, tasks_per_forward=1)
    assert (result.made, list(result.failed)) == (3, ["big"])
    assert "Memory ran out on task 'big' alone" in json.loads((tmp_path / "failed.json").read_text())["big"]


def test_a_task_of_the_name_of_the_summary(model: PeftModel, tmp_path: Path):
    result = adapt_folder(model, {"Failed.json": TASKS["say p"], "one": letter_rows("o")[:1]}, tmp_path, hold_back=0.3)
    assert (result.made, list(result.failed)) == (1, ["one"])
    assert (tmp_path / "failed.json").is_file()


def test_failures_are_written_as_they_come(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meta_peft.adaptation.folder.STACKS", 1)
    known: list[bool] = []
    tasks = {"one row": letter_rows("o")[:1], **TASKS}
    adapt_folder(
        model,
        tasks,
        tmp_path,
        hold_back=1,
        tasks_per_forward=1,
        done=lambda made: known.append((tmp_path / "failed.json").is_file()),
    )
    assert known == [True, True, True], "before the next tasks are done"


def test_a_task_that_fails_does_not_stop_the_others(model: PeftModel, tmp_path: Path):
    tasks = {**TASKS, "one row": letter_rows("o")[:1]}
    result = adapt_folder(model, tasks, tmp_path, hold_back=0.3)
    assert result.made == 3
    assert list(result.failed) == ["one row"]
    assert "leaves none of them to adapt on" in json.loads((tmp_path / "failed.json").read_text())["one row"]
    assert adapt_folder(model, TASKS, tmp_path, hold_back=0.3).failed == {}
    assert not (tmp_path / "failed.json").exists(), "of an earlier call"


def test_weights_that_are_not_finite_are_not_written(model: PeftModel, tmp_path: Path):
    learned = model.meta_peft
    learned.sidecar.log_rates.fill_(300.0)
    result = adapt_folder(model, {"say p": TASKS["say p"]}, tmp_path)
    assert "not finite" in result.failed["say p"]
    assert {path.name for path in tmp_path.iterdir()} == {"failed.json"}


def test_more_tasks_than_are_read_at_a_time(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meta_peft.adaptation.folder.STACKS", 1)
    result = adapt_folder(model, letter_tasks("mnopabc", 2), tmp_path, tasks_per_forward=2)
    assert result.made == 7


def test_the_best_step_on_held_back_rows_counts(model: PeftModel):
    """With rates that are far too high, the last step is not always the best one, and the first of the best is taken."""
    model.meta_peft.sidecar.log_rates.add_(5.0)
    tasks = {"say p": letter_rows("p")[:4], "say m": letter_rows("m")[:4]}
    up_to = [adapt_many(model, tasks, steps=k, hold_back=0.5) for k in range(1, 9)]
    stopped = up_to[-1]
    for name, result in stopped.items():
        losses = [found[name].metrics["held_back_loss_after"] for found in up_to]
        assert losses == sorted(losses, reverse=True)  # more steps to choose from are never worse
        assert losses[0] <= result.metrics["held_back_loss_before"]
        ended = [found[name].metrics["steps"] for found in up_to]
        assert result.metrics["steps"] == ended[losses.index(losses[-1])]
    assert any(found[name].metrics["steps"] < k for k, found in enumerate(up_to, 1) for name in tasks)
    for name in tasks:  # alone, too, each has its own best step
        alone = adapt_many(model, {name: tasks[name]}, steps=8, hold_back=0.5)[name]
        assert alone.metrics["steps"] == stopped[name].metrics["steps"]


def test_held_back_rows_are_not_adapted_on(model: PeftModel):
    rows = letter_rows("p")[:4]
    first = adapt_many(model, {"a": rows}, hold_back=0.25, steps=1)["a"]
    again = adapt_many(model, {"a": rows}, hold_back=0.25, steps=1)["a"]
    assert bits(first.weights) == bits(again.weights)
    matches = []
    for left_out in range(4):
        others = [row for i, row in enumerate(rows) if i != left_out]
        matches.append(bits(adapt_many(model, {"a": others}, steps=1)["a"].weights) == bits(first.weights))
    assert sum(matches) == (1 if first.metrics["steps"] else 0)


def test_rows_held_back_by_their_number_or_their_share(model: PeftModel):
    tasks = {"a": letter_rows("p")[:4]}
    by_number, by_share = (adapt_many(model, tasks, hold_back=held)["a"] for held in (2, 0.5))
    assert bits(by_number.weights) == bits(by_share.weights)
    assert bits(by_number.weights) != bits(adapt_many(model, tasks, hold_back=1)["a"].weights)
    with pytest.raises(MetaPeftError, match="has 4 support rows, and hold_back=4 leaves none of them"):
        adapt_many(model, tasks, hold_back=4)


@pytest.mark.parametrize("hold_back", [-0.1, 1.0, 1.5, -1, float("nan"), "2"])
def test_what_cannot_be_held_back(model: PeftModel, tmp_path: Path, hold_back: float):
    with pytest.raises(MetaPeftError, match="hold_back must be a share"):
        adapt_folder(model, TASKS, tmp_path, hold_back=hold_back)
    with pytest.raises(MetaPeftError, match="hold_back must be a share"):
        adapt_many(model, TASKS, hold_back=hold_back)


def test_a_file_of_rows(model: PeftModel, tmp_path: Path):
    file = write_jsonl(tmp_path / "rows.jsonl", TASKS, column="customer")
    assert adapt_folder(model, file, tmp_path / "out", task_column="customer").made == 3
    with pytest.raises(MetaPeftError, match="names the task of each row"):
        adapt_folder(model, file, tmp_path / "out")


def test_a_task_of_another_call_keeps_its_folder(model: PeftModel, tmp_path: Path):
    """Once the second of two names that make one folder's name took the first one's place, without a word."""
    seen: dict[str, Path] = {}

    def note(made: Made) -> None:
        assert seen.setdefault(made.task, made.folder) == made.folder

    adapt_folder(model, {"A&B": TASKS["say p"]}, tmp_path, done=note)
    first = bits(weights_in(tmp_path / "A_B"))
    assert adapt_folder(model, {"A/B": TASKS["say m"]}, tmp_path, done=note).made == 1
    assert seen == {"A&B": tmp_path / "A_B", "A/B": tmp_path / folder_names(["A/B"], tmp_path)["A/B"]}
    assert seen["A/B"].name.startswith("A_B-")
    assert bits(weights_in(tmp_path / "A_B")) == first
    both = {"A&B": TASKS["say p"], "A/B": TASKS["say m"]}
    for tasks in (both, *({task: rows} for task, rows in both.items())):
        assert adapt_folder(model, tasks, tmp_path, done=note).already == len(tasks)


def test_tasks_of_one_call_keep_their_folders_when_they_come_alone(model: PeftModel, tmp_path: Path):
    both = {"A&B": TASKS["say p"], "A/B": TASKS["say m"]}
    adapt_folder(model, both, tmp_path)
    assert all(adapt_folder(model, {task: rows}, tmp_path).already == 1 for task, rows in both.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_with_the_names_that_training_changed(model: PeftModel, tmp_path: Path):
    adapt_folder(model, TASKS, tmp_path / "new")
    learned = model.meta_peft
    form = RowForm({"input": "target", "target": "input", "customer": "task"})  # once each, and not there and back
    model.meta_peft = replace(learned, sidecar=replace(learned.sidecar, row_form=form))
    rows = [
        {"customer": name, "input": row["target"], "target": row["input"]} for name, of in TASKS.items() for row in of
    ]
    for column in ("task", "customer"):
        assert adapt_folder(model, rows, tmp_path / column, task_column=column).made == 3
        for name in FOLDERS:
            assert bits(weights_in(tmp_path / column / name)) == bits(weights_in(tmp_path / "new" / name))


def test_names_of_folders(tmp_path: Path):
    names = folder_names(["de/date", "..", "Task", "task", "plain-1_x", "ä" * 101], tmp_path)
    assert (names["de/date"], names[".."], names["plain-1_x"]) == ("de_date", "_", "plain-1_x")
    assert names["Task"].startswith("Task-")
    assert names["task"].startswith("task-")
    assert len({name.casefold() for name in names.values()}) == 6
    assert all(len(name.encode()) <= 200 for name in names.values())
    assert folder_names(["task"], tmp_path) == {"task": "task"}
