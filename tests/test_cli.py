"""Each command end to end, in this process, on the tiny model."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from surface import (
    EVAL,
    TEST,
    TRAIN,
    base_model,
    environment,
    letter_rows,
    letter_tasks,
    run_python,
    tiny_folder,
    trained_folder,
    write_jsonl,
)

import meta_peft
from meta_peft import MetaLoraConfig, ModelArguments, TaskArguments, adapt, adapt_folder, load
from meta_peft.adapters.sidecar import JSON
from meta_peft.cli import main
from meta_peft.commands import estimate, evaluate, tasks, train
from meta_peft.comparison.compare import CompareArguments
from meta_peft.comparison.task_report import TaskReportArguments
from meta_peft.estimate.estimate import EstimateArguments
from meta_peft.protocol import ProtocolArguments


def meta() -> str:
    return str(trained_folder())


@pytest.fixture(scope="module", autouse=True)
def _trained() -> None:
    """Before any test captures output."""
    trained_folder()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """`main` sets up logging as a program does."""
    names = ("meta_peft", "bitsandbytes")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def support(tmp_path: Path) -> Path:
    path = tmp_path / "support.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letter_rows("p")[:3]))
    return path


def option_names(group: type) -> set[str]:
    return {field.name for field in dataclasses.fields(group) if field.init}


def train_words(tmp_path: Path, *more: str) -> list[str]:
    for split, letters in (("train", TRAIN), ("validation", EVAL), ("test", TEST)):
        write_jsonl(tmp_path / f"{split}.jsonl", letter_tasks(letters))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_folder()}\noutput_dir: {tmp_path}/out\ntrain_tasks: {tmp_path}/train.jsonl\n"
        f"validation_tasks: {tmp_path}/validation.jsonl\ntest_tasks: {tmp_path}/test.jsonl\n"
        "max_steps: 2\nshots: 2\nquery_size: 2\ninner_steps: 1\n"
        "per_device_train_batch_size: 2\nlora_r: 4\nadaptation_steps: [0, 2]\nrate_factors: [1, 2]\nmax_length: 32\n"
        "save_strategy: 'no'\nreport_to: none\nuse_cpu: true\n"
    )
    return ["train", "--config", str(config), *more]


# ---- commands


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(train_words(tmp_path, "--max-steps", "1", "--seed=7")) == 0
    shown = capsys.readouterr().out
    assert "| meta-learned LoRA | 2 |" in shown
    assert f"Adapter, table and plot are in {tmp_path}/out." in shown
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (values["run"]["training"]["max_steps"], values["run"]["training"]["seed"]) == (1, 7)
    adapt(load(None, tmp_path / "out"), letter_rows("p")[:2])


def test_evaluate_gives_the_numbers_of_the_training(tmp_path: Path):
    """The same support and query rows: once they were drawn by another seed."""
    assert main(train_words(tmp_path, "--seed=7")) == 0
    words = ["evaluate", "--adapter", f"{tmp_path}/out", "--tasks", f"{tmp_path}/test.jsonl", "--steps", "0", "2"]
    assert main([*words, "--output", f"{tmp_path}/again"]) == 0
    first, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "again"))

    def losses(found: dict) -> dict[str, list[float]]:
        return dict(zip(found["tasks"], found["by_task"]["meta-learned LoRA"]["loss"], strict=True))

    for task, expected in losses(first).items():
        assert losses(again)[task] == pytest.approx(expected, rel=1e-5)


def test_adapt_to_one_task(tmp_path: Path, support: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "adapted"
    assert main(["adapt", "--adapter", meta(), "--support", str(support), "--output", str(output), "--steps", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["task"], said["folder"], said["steps"]) == ("task", str(output), 2)
    model, metrics = adapt(load(None, meta()), letter_rows("p")[:3], steps=2)
    assert {key: said[key] for key in metrics} == metrics
    expected = {n.replace(".adapted", ""): p for n, p in model.named_parameters() if ".adapted." in n}
    saved = load_file(output / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    PeftModel.from_pretrained(base_model(), str(output))


def test_adapt_to_each_task_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tasks = {"de/date": letter_rows("p")[:2], "..": letter_rows("m")[:3], "plain-1_x": letter_rows("n")[:2]}
    file = write_jsonl(tmp_path / "tasks.jsonl", tasks, column="family")
    output = tmp_path / "adapted"
    words = ["adapt", "--adapter", meta(), "--support", str(file), "--output", str(output), "--task-column", "family"]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    folders = dict(zip(tasks, ("de_date", "_", "plain-1_x"), strict=True))
    assert {path.name for path in output.iterdir()} == set(folders.values())
    assert {line["task"]: line["folder"] for line in lines} == {n: str(output / f) for n, f in folders.items()}
    assert all(line["support_loss_after"] < line["support_loss_before"] for line in lines)
    assert main(words) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line.pop("already") for line in again)
    assert {line["task"]: line for line in again} == {line["task"]: line for line in lines}

    in_python = tmp_path / "in_python"
    adapt_folder(load(None, meta()), file, in_python, task_column="family")
    for folder in folders.values():
        for made in (output / folder).iterdir():
            assert made.read_bytes() == (in_python / folder / made.name).read_bytes(), made


def with_old_names(file: Path) -> str:
    """The rows of a file, as one has them who trains with ``rename_columns``."""
    old = {"task": "kind", "input": "word", "target": "answer"}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({old[c]: value for c, value in row.items()}) + "\n" for row in rows))
    return str(file)


def test_what_train_reads_the_other_commands_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Once the names that `train` was told of were not known to `adapt` and `evaluate`."""
    words = train_words(tmp_path, "--rename_columns", "kind=task", "word=input", "answer=target", "--compare", "none")
    for split in ("train", "validation", "test"):
        with_old_names(tmp_path / f"{split}.jsonl")
    assert main(words) == 0
    adapter = ["--adapter", f"{tmp_path}/out"]
    file = with_old_names(write_jsonl(tmp_path / "tasks.jsonl", letter_tasks("mn", 4)))
    one = with_old_names(write_jsonl(tmp_path / "one.jsonl", letter_tasks("m", 4)))
    adapting = ["adapt", *adapter, "--support", file, "--output", f"{tmp_path}/each"]
    capsys.readouterr()
    assert "of 2 tasks by their column 'task'" in message(capsys, adapting)
    assert main([*adapting, "--task-column", "kind"]) == 0
    assert main(["adapt", *adapter, "--support", one, "--output", f"{tmp_path}/alone"]) == 0
    each, alone = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("each/say_m", "alone"))
    assert all(torch.equal(each[name], alone[name]) for name in each)
    capsys.readouterr()
    assert main(["evaluate", *adapter, "--tasks", file, "--steps", "1"]) == 0
    assert "Tasks: 2, 2 examples and 2 questions each." in capsys.readouterr().out
    assert main(["inspect", *adapter]) == 0
    assert "columns renamed kind=task word=input answer=target" in capsys.readouterr().out


def test_translations_that_train_reads_the_other_commands_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"translation": {"a": row["input"], "b": row["target"]}} for row in letter_rows("p")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = train_words(tmp_path, "--compare", "none", "--train_tasks", str(file), "--max_steps", "1")
    assert main([*words, "--validation_tasks", "null", "--test_tasks", "null"]) == 0
    adapter = ["--adapter", f"{tmp_path}/out"]
    adapting = ["adapt", *adapter, "--support", str(file), "--output", f"{tmp_path}/adapted"]
    capsys.readouterr()
    assert "in the directions a-b and b-a, each of which is a task" in message(capsys, adapting)
    assert main([*adapting, "--task-column", "task"]) == 0
    assert {path.name for path in (tmp_path / "adapted").iterdir()} == {"a-b", "b-a"}
    capsys.readouterr()
    assert main(["evaluate", *adapter, "--tasks", str(file), "--steps", "1"]) == 0
    assert "Tasks: 2, 2 examples and" in capsys.readouterr().out


def test_classes_that_are_the_tasks_of_train_are_those_of_the_other_commands(tmp_path: Path, capsys):
    """Of plain text the words that were masked, whose column no option names; a support row of each is one task."""
    (tmp_path / "corpus.txt").write_text(
        "\n".join(f"On {c} {i} {c}{c}{c} went by now." for c in TRAIN for i in range(8))
    )
    words = train_words(
        tmp_path, "--train_tasks", f"{tmp_path}/corpus.txt", "--self_supervised", "smlmt", "--ways", "2"
    )
    assert main([*words, "--validation_tasks", "null", "--test_tasks", "null", "--label_words", "letters"]) == 0
    rows = [{"text": f"On {i} the ___ went by.", "label": label} for label in ("owl", "fox", "hen") for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = ["--adapter", f"{tmp_path}/out"]
    capsys.readouterr()
    assert main(["evaluate", *adapter, "--tasks", str(file), "--steps", "1"]) == 0
    assert "Tasks: 3, 2 examples and 2 questions of each of 2 classes." in capsys.readouterr().out
    assert main(["adapt", *adapter, "--support", str(file), "--output", f"{tmp_path}/adapted"]) == 0


def test_rows_that_were_cut_are_counted_of_each_split(tmp_path: Path):
    """Held-out tasks too, of which some are drawn."""
    words = train_words(tmp_path, "--max_length", "6", "--max_test_tasks", "2", "--max_steps", "1")
    assert main(words) == 0
    data = json.loads((tmp_path / "out" / "results.json").read_text())["run"]["data"]
    assert {split: found["cut_rows"] > 0 for split, found in data.items()} == dict.fromkeys(data, True)
    assert data["test"]["cut_rows"] <= data["validation"]["cut_rows"]


def test_a_task_that_fails_is_reported_by_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_jsonl(tmp_path / "tasks.jsonl", {"good": letter_rows("p")[:2], "small": letter_rows("m")[:1]})
    output = tmp_path / "adapted"
    words = ["adapt", "--adapter", meta(), "--support", str(file), "--output", str(output), "--task-column", "task"]
    assert main([*words, "--hold-back", "0.5"]) == 3
    shown = capsys.readouterr()
    assert [json.loads(line)["task"] for line in shown.out.splitlines()] == ["good"]
    assert "1 of 2 tasks failed, such as 'small': Task 'small' has 1 support rows" in shown.err
    assert "small" in json.loads((output / "failed.json").read_text())


def test_rows_and_tasks_that_are_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What the messages advise, the commands take."""
    empty = [{"input": "a", "target": ""}]
    rows = {"good": letter_rows("p") + empty, "small": letter_rows("m")[:1]}
    file, output = str(write_jsonl(tmp_path / "tasks.jsonl", rows)), tmp_path / "adapted"
    adapting = ["adapt", "--adapter", meta(), "--support", file, "--output", str(output), "--task-column", "task"]
    assert "leave such rows out with empty_rows: leave_out" in message(capsys, adapting)
    assert main([*adapting, "--empty-rows", "leave_out"]) == 0
    assert {path.name for path in output.iterdir()} == {"good", "small"}
    capsys.readouterr()
    evaluating = ["evaluate", "--adapter", meta(), "--tasks", file, "--steps", "1"]
    assert "leave such rows out with empty_rows: leave_out" in message(capsys, evaluating)
    evaluating += ["--empty-rows", "leave_out"]
    assert "leave the task out (small_tasks: leave_out)" in message(capsys, evaluating)
    capsys.readouterr()
    assert main([*evaluating, "--small-tasks", "leave_out"]) == 0
    assert "Tasks: 1, 2 examples and 6 questions each." in capsys.readouterr().out


def test_evaluate_leaves_empty_rows_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The numbers are those of the same file without them."""
    tables = []
    for empty in ([], [{"input": "a", "target": None}, {"input": "", "target": "mm"}]):
        file = write_jsonl(
            tmp_path / "tasks.jsonl", {name: [*empty, *rows] for name, rows in letter_tasks("mn").items()}
        )
        words = ["evaluate", "--adapter", meta(), "--tasks", str(file), "--steps", "1", "--empty-rows", "leave_out"]
        assert main(words) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


@pytest.mark.parametrize("option", ["--load-in-4bit", "--load-in-8bit", "--dtype=bfloat16"])
def test_adapt_on_a_base_of_another_precision(tmp_path: Path, support: Path, option: str, capsys):
    words = ["--adapter", meta(), "--support", str(support), "--output", str(tmp_path / "a")]
    losses = []
    for more in ([], [option, "--model-name-or-path", str(tiny_folder())]):
        assert main(["adapt", *words, *more]) == 0
        losses.append(json.loads(capsys.readouterr().out)["support_loss_before"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.3)


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_jsonl(tmp_path / "tasks.jsonl", letter_tasks(TEST))
    output = tmp_path / "results"
    words = ["evaluate", "--adapter", meta(), "--tasks", str(file), "--output", str(output)]
    assert main([*words, "--steps", "3", "0", "--shots", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Tasks: 4, 3 examples and 5 questions each." in shown
    assert (output / "results.md").read_text().strip() in shown
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [0, 3]
    assert rows[1]["loss"] < rows[0]["loss"]

    assert (
        main(["evaluate", "--adapter", meta(), "--tasks", str(file), "--steps", "3", "--tasks-per-forward", "1"]) == 0
    )
    assert "Tasks: 4, 2 examples and 6 questions each." in capsys.readouterr().out  # shots of the meta-training
    assert main(["evaluate", "--adapter", meta(), "--tasks", str(file), "--steps", "0", "--query-size", "2"]) == 0
    assert "Tasks: 4, 2 examples and 2 questions each." in capsys.readouterr().out
    wrong = ["evaluate", "--adapter", meta(), "--tasks", str(file), "--query-size", "0"]
    assert "--query-size must be 1 or more; got 0" in message(capsys, wrong)


@pytest.mark.parametrize(
    ("options", "head", "highest"),
    [
        (["--metric", "cer", "--max-new-tokens", "2"], "CER, %", 1),
        (["--metric", "accuracy", "--choice-score", "mean"], "accuracy, %", 1),
        (["--metric", "chrf"], "chrF", 100),
    ],
)
def test_evaluate_by_another_metric(tmp_path: Path, options: list[str], head: str, highest: float, capsys):
    tasks = {name: [{**row, "choices": ["mm", "nn"]} for row in rows] for name, rows in letter_tasks("mn").items()}
    file = write_jsonl(tmp_path / "tasks.jsonl", tasks)
    output = tmp_path / "results"
    words = ["evaluate", "--adapter", meta(), "--tasks", str(file), "--output", str(output), "--steps", "0", "5"]
    assert main([*words, *options]) == 0
    assert f"| {head} (95 % interval) |" in capsys.readouterr().out
    values = json.loads((output / "results.json").read_text())
    name = options[1]
    assert values["metric"] == name
    assert all(0 <= row[name] <= highest for row in values["rows"])
    better = min if name == "cer" else max
    assert better(row[name] for row in values["rows"]) == values["rows"][1][name]


def judged_adapter(folder: Path, **judged) -> str:
    """The trained adapter, with another note on how training judged it."""
    shutil.copytree(trained_folder(), folder)
    values = json.loads((folder / JSON).read_text())
    (folder / JSON).write_text(json.dumps(values | {"judged": judged}))
    return str(folder)


def test_evaluate_judges_as_training_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_jsonl(tmp_path / "tasks.jsonl", letter_tasks("mn"), column="customer")
    adapter = judged_adapter(tmp_path / "adapter", metric="cer", task_column=["customer"])
    words = ["evaluate", "--adapter", adapter, "--tasks", str(file), "--steps", "1"]
    assert main(words) == 0
    assert "| CER, % (95 % interval) |" in capsys.readouterr().out
    assert main([*words, "--metric", "token_f1", "--task-column", "input"]) == 2, "no task has rows enough"
    assert "token_f1" not in capsys.readouterr().out


def test_evaluate_draws_classes_as_training_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"text": row["input"], "label": letter} for letter in "mnop" for row in letter_rows(letter)]
    file = write_jsonl(tmp_path / "tasks.jsonl", {"kinds": rows})
    labelling = {"ways": 3, "words": "letters", "column": "label"}
    adapter = judged_adapter(tmp_path / "adapter", metric="accuracy", labelling=labelling)
    words = ["evaluate", "--adapter", adapter, "--tasks", str(file), "--steps", "1"]
    assert main(words) == 0
    assert "Tasks: 1, 2 examples and 6 questions of each of 3 classes." in capsys.readouterr().out
    few = write_jsonl(tmp_path / "few.jsonl", {"kinds": [row for row in rows if row["label"] in "mn"]})
    assert main([*words[:4], str(few)]) == 2
    assert "3" in capsys.readouterr().err


def test_evaluate_with_a_config_compares_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    letters = {"train": TRAIN, "validation": EVAL, "test": TEST}
    files = [f"--{s}_tasks={write_jsonl(tmp_path / f'{s}.jsonl', letter_tasks(letters[s]))}" for s in letters]
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_folder()}\nlora_target_modules: [q_proj]\nmax_steps: 1\nshots: 2\nquery_size: 2\n"
        "report_to: none\nuse_cpu: true\nadaptation_steps: [0, 2]\nrate_factors: [1]\n"
    )
    output = tmp_path / "out"
    words = ["evaluate", "--config", str(config), *files, "--output_dir", str(output), "--starts", "plain", "meta"]
    assert main([*words, "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Best on these tasks:" in shown
    assert "report.html" in shown
    assert (output / "report.html").is_file()
    assert main([*words, "--seeds", "1", "--inner_steps", "2"]) == 2
    assert "measured with other options" in capsys.readouterr().err


def test_inspect(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--adapter", meta(), "--plain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["base", "model", str(tiny_folder())]
    assert "maml, 2 shots, 3 inner steps" in lines[1]
    assert "'name': 'adam'" in lines[2]
    assert lines[3].split() == ["LoRA", "matrices", "16"]
    assert lines[4].endswith("learned")
    rates = [line.split() for line in lines if line.startswith("  ") and "lora_" in line]
    assert len(rates) == 16
    assert all(float(rate) > 0 for rate, _ in rates)
    assert rates[0][1].endswith("q_proj.lora_A.weight")
    assert any(f"meta-peft adapt --adapter {meta()}" in line for line in lines), "what to do with it"


def test_inspect_shows_rates_as_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    picture = tmp_path / "rates.png"
    assert main(["inspect", "--adapter", meta(), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    (head,) = [line for line in shown.splitlines() if line.startswith("layer")]
    assert head.split()[1:5] == ["q_proj", "A", "q_proj", "B"]
    assert "█" in shown
    assert picture.stat().st_size > 1000


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--adapter", meta(), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["base"]["name"] == str(tiny_folder())
    assert len(values["rates"]) == len(values["matrices"]) == 16
    assert values["judged"]["task_column"] == ["task"]


def test_inspect_an_adapted_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapt_folder(load(None, meta()), {"say p": letter_rows("p")[:2]}, tmp_path)
    assert main(["inspect", "--adapter", str(tmp_path / "say_p")]) == 0
    shown = capsys.readouterr().out
    assert "say p  {'steps': 3" in shown
    assert f"PeftModel.from_pretrained(base, '{tmp_path / 'say_p'}')" in shown
    assert main(["inspect", "--adapter", str(tmp_path / "say_p"), "--plot", str(tmp_path / "rates.png")]) == 2
    assert "has none: leave it out" in capsys.readouterr().err
    assert main(["inspect", "--adapter", str(tmp_path)]) == 2
    assert "not the config of a PEFT adapter" in capsys.readouterr().err


def test_inspect_says_nothing_of_an_adapter_that_was_there_before(tmp_path: Path, support: Path, capsys):
    adapt_folder(load(None, meta()), {"say m": letter_rows("m")[:2]}, tmp_path)
    folder = str(tmp_path / "say_m")
    assert main(["adapt", "--adapter", meta(), "--support", str(support), "--output", folder]) == 0
    capsys.readouterr()
    assert main(["inspect", "--adapter", folder]) == 0
    assert "adapted to" not in capsys.readouterr().out


# ---- help


def test_help_fits_one_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 80
    for word in ("train", "adapt", "evaluate", "inspect", "push", "tasks", "examples:", "exit codes:"):
        assert any(word in line for line in lines), word


COMMANDS = {
    ("train",): train.HELP,
    ("adapt",): "",
    ("evaluate",): "",
    ("inspect",): "",
    ("push",): "",
    ("tasks",): tasks.HELP,
    ("evaluate", "--config", "x.yaml"): evaluate.COMPARE_HELP,
    ("inspect", "--estimate"): estimate.HELP,
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_each_command(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: meta-peft {command[0]} ")
    assert len(lines) <= 26, "one screen"
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("example") for line in lines)


RUN = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments)
OWN = {
    "train": (train.HELP, RUN, set()),
    "tasks": (tasks.HELP, (*RUN, TaskReportArguments), option_names(TaskReportArguments)),
    "evaluate": (evaluate.COMPARE_HELP, (*RUN, ProtocolArguments), option_names(ProtocolArguments)),
    "inspect": (estimate.HELP, (*RUN, EstimateArguments), option_names(EstimateArguments)),
}


@pytest.mark.parametrize("command", OWN)
def test_pages_of_help_name_options_that_there_are(command: str):
    """These pages are written by hand, so that nothing has to be imported to show them."""
    page, groups, own = OWN[command]
    named = set(re.findall(r"--([a-z_0-9]+)", page)) - {"config", "key", "help_all", "help"}
    assert named <= {name for group in groups for name in option_names(group)}
    assert own <= named, "every option of its own is there"


def test_help_all_lists_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(["tasks", "--help_all"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("inner_lr", "gradient_checkpointing", "report_dir"))


@pytest.mark.parametrize("command", ["", "train", "tasks", "adapt"])
def test_help_is_quick(command: str):
    """Without torch, whose import takes seconds."""
    run_python(
        f"import sys\nfrom meta_peft.cli import main\ntry:\n    main('{command} --help'.split())\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"meta-peft {meta_peft.__version__}\n"


def test_options_may_be_written_as_those_of_train(tmp_path: Path, support: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--adapter", meta(), "--support", str(support), "--output", str(tmp_path / "a"), "--steps", "1"]
    assert main(["adapt", *words, "--tasks_per_forward=1", "--hold_back", "1"]) == 0
    assert "held_back_loss_after" in json.loads(capsys.readouterr().out)


def test_train_stopped_by_a_signal_says_how_to_go_on(tmp_path: Path):
    words = train_words(tmp_path, "--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "100000")
    own = environment(PYTHONUNBUFFERED="1")
    command = [sys.executable, "-m", "meta_peft.cli", *words, "--logging_steps", "1", "--disable_tqdm", "true"]
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        seen = next(line for line in run.stdout if "'loss'" in line)
        run.send_signal(signal.SIGTERM)
        rest = run.stdout.read()
    assert run.returncode == 143, seen + rest
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"To go on: --output_dir {tmp_path}/out --resume_from_checkpoint {checkpoint}\n" in rest


def test_stopped_by_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def stopped(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("meta_peft.commands.inspect.run", stopped)
    assert main(["inspect", "--adapter", meta()]) == 130
    assert capsys.readouterr().err == "meta-peft: stopped.\n"


# ---- errors


def message(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What `main` says on stderr when it refuses `words`; nothing else is printed, and no file is written."""
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    said = shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err
    assert said.startswith("meta-peft: ")
    return said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["adopt"], "There is no command 'adopt'. Did you mean 'adapt'?"),
        (["xyzzy"], "There is no command 'xyzzy'."),
        (
            [],
            "arguments are required: {train,adapt,evaluate,inspect,push,tasks}; meta-peft --help shows what there is.",
        ),
        (["adapt"], "The following arguments are required: --adapter, --support, --output; meta-peft adapt --help"),
        (["inspect", "--adapter"], "Argument --adapter: expected one argument"),
        (["inspect", "--adapter", "x", "y"], "Unrecognized arguments: y"),
        (["inspect", "--adapter", "x", "--what"], "There is no option --what. Try --help."),
        (["adapt", "--adaptor", "x"], "There is no option --adaptor. Did you mean '--adapter'?"),
        (["evaluate", "--task_columns=x"], "There is no option --task-columns. Did you mean '--task-column'?"),
        (
            ["adapt", "--task-column", "a", "--support", "x", "--task_column=b"],
            "--task-column is given twice: give it once",
        ),
        (["evaluate", "--steps", "1", "--steps", "2"], "--steps is given twice"),
        (["inspect", "--adapter", "x", "--json", "--json"], "--json is given twice"),
        (["push", "--to", "a/b", "--to=a/c"], "--to is given twice"),
        (["tasks", "--shots", "2", "--shots", "3"], "--shots is given twice"),
        (["train", "--task_column", "a", "--task-column=b"], "--task_column is given twice"),
        (["train", "--config", "a.yaml", "--config=b.yaml"], "--config is given twice"),
        (["train", "--shot", "3"], "There is no option --shot. Did you mean 'shots'?"),
        (["train", "--shots", "0"], "shots must be a number of 1 or more; got 0"),
        (["train", "--config", "nothing.yaml"], "There is no config file 'nothing.yaml'"),
        (
            ["train", "--config", "a.yaml", "--config=b.yaml"],
            "--config is given twice: name one file, and what is to be",
        ),
        (
            ["evaluate", "--config", "a.yaml", "--adapter", "b", "--tasks=c.jsonl"],
            "evaluate takes either --config, to compare starts, or --adapter with --tasks, to judge one adapter: leave out"
            " --config, or --adapter and --tasks.",
        ),
        (
            ["adapt", "--adapter", "a", "--support", "b", "--output", "c", "--hold-back", "half"],
            "Argument --hold-back: expected a share of the examples, 0 or more and below 1, or a whole number of them; got"
            " 'half'; meta-peft adapt --help",
        ),
        (["train", "--train_tasks", "nothing.jsonl"], "There is no file 'nothing.jsonl'"),
        (
            ["inspect", "--adapter", "no/such-adapter"],
            "'no/such-adapter' is neither a folder nor an adapter the hub gives",
        ),
        (
            ["inspect", "--adapter", "no/such-adapter", "--plot", "rates.xyz"],
            "A picture cannot be written as rates.xyz",
        ),
        (["train", "--lr_scheduler_type", "cosine_with_min_lr"], "cannot be made: One of min_lr"),
    ],
)
def test_words_that_cannot_be_used(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert expected in message(capsys, words)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--support": "nothing.jsonl"}, "There is no file 'nothing.jsonl'."),
        ({"--support": "."}, "must be a file with the examples of one task, and '.' is a folder"),
        ({"--steps": "-1"}, "steps must be a whole number from 0 to 1000000; got -1."),
        ({"--hold-back": "2.5"}, "or a whole number of them; got 2.5"),
        ({"--hold-back": "some"}, "Argument --hold-back:"),
        ({"--empty-rows": "leave_out"}, "--empty-rows goes with --task-column"),
        ({"--steps": "many"}, "Argument --steps: invalid int value: 'many'"),
        ({"--task-column": "family"}, "Expected a column 'family' that names the task of each row"),
        ({"--dtype": "float16"}, "dtype=float16 is refused"),
        ({"--model-name-or-path": "no/such-model"}, "The base model 'no/such-model' cannot be loaded"),
        (
            {"--model-name-or-path": "/no/such/folder"},
            "There is no folder '/no/such/folder': correct the path, or give an",
        ),
        ({"--adapter": "."}, "has no meta_peft.json"),
    ],
)
def test_adapt_errors(tmp_path: Path, support: Path, change: dict[str, str], expected: str, capsys):
    output = tmp_path / "adapted"
    options = {"--adapter": meta(), "--support": str(support), "--output": str(output)} | change
    assert main(["adapt", *(word for pair in options.items() for word in pair)]) == 2
    shown = capsys.readouterr()
    assert expected in shown.err
    assert shown.out == ""
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--shots", "8"], "has 8 distinct rows, but an episode takes 8 support rows and 1 query rows"),
        (["--shots", "0"], "--shots must be 1 or more; got 0."),
        (["--steps", "0", "-1"], "--steps must be 0 or more; got -1."),
        (["--tasks-per-forward", "0"], "--tasks-per-forward must be 1 or more; got 0."),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more; got 0."),
        (["--small-tasks", "leave"], "--small-tasks must be one of error, leave_out; got 'leave'."),
        (["--metric", "acuracy"], "got 'acuracy'. Did you mean 'accuracy'?"),
        (["--choice-score", "max"], "--choice-score must be one of sum, mean; got 'max'."),
        (["--task-column", "family"], "Expected a column 'family'"),
    ],
)
def test_evaluate_errors(tmp_path: Path, more: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    file = write_jsonl(tmp_path / "tasks.jsonl", letter_tasks("mn"))
    assert main(["evaluate", "--adapter", meta(), "--tasks", str(file), *more]) == 2
    assert expected in capsys.readouterr().err


def damage(folder: Path) -> None:
    (folder / "meta_peft.json").write_text("{")


def foreign(folder: Path) -> None:
    values = json.loads((folder / "meta_peft.json").read_text())
    values["base"]["embedding"] = values["base"]["embedding"][::-1]
    (folder / "meta_peft.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "expected"),
    [(damage, "is damaged or not a sidecar of meta_peft"), (foreign, "load the base model the adapter belongs to")],
)
def test_adapters_that_cannot_be_used(
    tmp_path: Path, support: Path, change: Callable[[Path], None], expected: str, capsys
):
    folder = Path(shutil.copytree(meta(), tmp_path / "meta"))
    change(folder)
    words = ["adapt", "--adapter", str(folder), "--support", str(support), "--output", str(tmp_path / "x")]
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_adapting_to_rows_of_several_tasks_asks_which_column_names_them(tmp_path: Path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", letter_tasks("pq", 3))
    words = ["adapt", "--adapter", meta(), "--support", str(rows), "--output", str(tmp_path / "adapted")]
    assert "The rows are of 2 tasks by their column 'task'" in message(capsys, words)
    assert not (tmp_path / "adapted").exists()


def test_several_columns_name_the_tasks_to_adapt_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As the message says, which once named one column that there was not."""
    rows = [
        {"customer": customer, "the language": language, **row}
        for customer, language, letter in (("acme", "de", "p"), ("acme", "en", "q"), ("b", "de", "r"))
        for row in letter_rows(letter)[:2]
    ]
    file, output = tmp_path / "rows.jsonl", tmp_path / "adapted"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = judged_adapter(tmp_path / "adapter", task_column=["customer", "the language"])
    words = ["adapt", "--adapter", adapter, "--support", str(file), "--output", str(output)]
    said = message(capsys, words)
    assert "3 tasks by their columns 'customer' and 'the language'" in said
    assert "give --task-column customer 'the language' to adapt to each" in said
    assert main([*words, "--task-column", "customer", "the language"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["task"] for line in lines] == ["acme / de", "acme / en", "b / de"]
