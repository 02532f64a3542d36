"""The whole main job on a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
from surface import EVAL, TEST, TRAIN, config, letter_rows, letter_tasks, tiny_folder, write_jsonl

from meta_peft import MetaPeftError, ModelArguments, TaskArguments, adapt, load
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.comparison.compare import CompareArguments
from meta_peft.comparison.early_stops import PARTS
from meta_peft.evaluation.report import Report
from meta_peft.functional.row_length import LEARNED, check_length
from meta_peft.main_job import _how_to_go_on, run
from meta_peft.run_tasks.task_loading import load_tasks
from meta_peft.survival import training_state
from meta_peft.training.trainer import MetaTrainer

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "meta_peft.json", "meta_peft.safetensors"}
RESULTS = {"results.json", "results.md", "results.png"}


def job(tmp_path: Path, compare: str = "plain", *, splits=("train", "validation", "test"), comparison=(), **options):
    letters = {"train": TRAIN, "validation": EVAL, "test": TEST}
    files = {f"{s}_tasks": str(write_jsonl(tmp_path / f"{s}.jsonl", letter_tasks(letters[s]))) for s in splits}
    output = tmp_path / "out"
    model = ModelArguments(
        str(tiny_folder()), lora_r=4, lora_target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]
    )
    compared = CompareArguments(compare, [3, 0], [0.5, 2.0], **dict(comparison))
    report = run(model, TaskArguments(**files), config(output, max_steps=4, learning_rate=0.01, **options), compared)
    return output, report


def assert_usable(output: Path) -> None:
    _, metrics = adapt(load(None, output), letter_rows("p")[:2])
    assert metrics["support_loss_after"] < metrics["support_loss_before"]


def test_nothing_compared(tmp_path: Path):
    output, report = job(tmp_path, "none")
    assert report is None
    assert {path.name for path in output.iterdir()} == ADAPTER
    assert_usable(output)


@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ("train", "validation")])
def test_without_held_out_tasks_there_is_nothing_to_compare_on(tmp_path: Path, splits: tuple[str, ...]):
    output, report = job(tmp_path, "full", splits=splits)
    assert report is None
    assert {path.name for path in output.iterdir()} == ADAPTER


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"splits": ("train", "test")}, "eval_strategy=steps evaluates on validation tasks, and there are none"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model=accuracy is not measured"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr .* cannot be made"),
    ],
    ids=str,
)
def test_what_the_trainer_would_stumble_over_is_known_before_the_base_is_loaded(
    tmp_path: Path, options: dict, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("meta_peft.main_job.new_model", None)
    with pytest.raises(MetaPeftError, match=said):
        job(tmp_path, **{"eval_strategy": "steps", "eval_steps": 1} | options)


def test_compared_with_plain_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output, report = job(tmp_path, "plain")
    assert isinstance(report, Report)
    assert list(report.curves) == ["plain LoRA", "meta-learned LoRA"]
    assert {path.name for path in output.iterdir()} == ADAPTER | RESULTS
    shown = capsys.readouterr().out
    assert report.markdown() in shown
    for name, curve in report.curves.items():  # of two rates that are tried each is at an edge
        edge = {0.5: "smallest", 2.0: "largest"}[curve.factors[1]]
        assert f"The best of the rates that were tried for {name} after 3 steps is the {edge}" in shown
    assert sorted(report.tasks) == sorted(letter_tasks(TEST))

    plain, learned = report.curves.values()
    assert plain.steps == learned.steps == (0, 3)
    assert plain.loss.shape == learned.score.shape == (4, 2)
    assert plain.loss[:, 1].mean() < plain.loss[:, 0].mean()
    assert set(learned.factors) <= {0.5, 2.0}
    assert Sidecar.read(output).rate_factors == {3: learned.factors[1]}, "for no steps there is none"
    assert report.markdown() in (output / "README.md").read_text()
    assert_usable(output)

    values = json.loads((output / "results.json").read_text())
    assert len(values["rows"]) == 4
    about = values["run"]
    assert about["model"]["model_name_or_path"] == str(tiny_folder())
    assert (about["tasks"]["n_train"], about["tasks"]["n_validation"], about["tasks"]["n_test"]) == (8, 4, 4)
    assert (about["training"]["max_steps"], about["training"]["algorithm"], about["training"]["seed"]) == (
        4,
        "maml",
        42,
    )
    assert (about["training"]["memory"], about["training"]["fast_weights"]) == ("auto", None)
    assert about["versions"]["torch"] == version("torch")
    assert about["training_seconds"] > 0
    assert about["data"]["train"] == {
        "rows": 64,
        "tasks": 8,
        "repeated_rows": 0,
        "empty_rows": 0,
        "rows_in_several_tasks": 0,
        "single_label_tasks": 0,
        "cut_rows": 0,
    }


def test_the_results_of_an_earlier_run_do_not_stay_beside_another_adapter(tmp_path: Path):
    job(tmp_path, "plain")
    output, _ = job(tmp_path, "none", seed=7)
    assert {path.name for path in output.iterdir()} == ADAPTER


def test_a_run_that_stops_before_its_comparison_leaves_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output, _ = job(tmp_path, "plain")

    def stops(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meta_peft.main_job.compare", stops)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, "plain", seed=7)
    assert {path.name for path in output.iterdir()} == ADAPTER


def test_baselines_adapt_as_users_do_where_the_run_does_not(tmp_path: Path):
    """At a rate that moves nothing, so that Adam on all weights is what the validation tasks choose."""
    _, report = job(tmp_path, "full", fast_weights="lora_B", inner_lr=1e-9, learn_inner_lr=False)
    plain, multitask, learned = report.curves.values()
    assert plain.how[1] == multitask.how[1] == "Adam on all weights"
    assert plain.loss[:, 1].mean() < plain.loss[:, 0].mean()
    assert not any(learned.how)
    assert "Adam on all weights" in report.markdown()


def test_prompts_of_examples_that_are_too_long_are_left_out(tmp_path: Path, monkeypatch, caplog):
    """Once the table was lost, when all the rest of it was measured."""

    def refused(*args):
        check_length(8, LEARNED, 9)

    monkeypatch.setattr("meta_peft.comparison.compare.in_context_scores", refused)
    output, report = job(tmp_path, "full")
    assert report.in_context is None
    assert "In-context examples are left out. Rows of 9 tokens are longer than the 8 that the base" in caplog.text
    assert "multi-task LoRA" in (output / "results.md").read_text()


def test_compared_with_everything(tmp_path: Path):
    output, report = job(tmp_path, "full")
    assert list(report.curves) == ["plain LoRA", "multi-task LoRA", "meta-learned LoRA"]
    assert report.in_context[0].shape == (4,)
    assert all(how in ("", *PARTS) for how in report.curves["multi-task LoRA"].how)
    starts = [curve.loss[:, 0].mean() for curve in report.curves.values()]
    assert starts[1] < starts[0], "multi-task training lowers the loss before any adaptation"
    assert len(set(starts)) == 3
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row["start"] for row in rows][-1] == "in-context examples"
    assert len(rows) == 7
    assert_usable(output)


def test_runs_are_the_same_each_time(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (first, report), (second, again) = (job(tmp_path / name) for name in ("a", "b"))
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()
    assert report.rows() == again.rows()


def test_at_most_so_many_tasks(tmp_path: Path):
    _, report = job(tmp_path, comparison={"max_test_tasks": 2, "max_validation_tasks": 1})
    assert len(report.tasks) == 2
    assert set(report.tasks) < set(letter_tasks(TEST))


def test_resuming_a_job(tmp_path: Path):
    whole, report = job(tmp_path, save_strategy="steps", save_steps=2)
    finished = (whole / "adapter_model.safetensors").read_bytes()
    options = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": str(whole / "checkpoint-2")}
    resumed, again = job(tmp_path, **options)
    assert (resumed / "adapter_model.safetensors").read_bytes() == finished
    assert report.rows() == again.rows()


@pytest.mark.parametrize(
    "saves", [{"save_strategy": "no"}, {"save_strategy": "steps", "save_only_model": True}], ids=str
)
def test_stopped_where_there_is_nothing_to_go_on_from(
    tmp_path: Path, saves: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In the evaluation after the last outer step, say. Once a checkpoint was named that was not there."""
    original = MetaTrainer.evaluate

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MetaTrainer, "evaluate", signalled)
    with pytest.raises(SystemExit) as ended:
        job(tmp_path, eval_strategy="steps", eval_steps=4, **saves)
    assert ended.value.code == 143
    assert "Stopped by a signal. There is no checkpoint of outer step 4 to go on from;" in capsys.readouterr().out
    assert_usable(tmp_path / "out")


def test_what_to_go_on_with_is_one_word_each(tmp_path: Path):
    folder = tmp_path / "with spaces"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / training_state.JSON).touch()
    words = shlex.split(_how_to_go_on(folder, 2).removeprefix("To go on: "))
    assert words == ["--output_dir", str(folder), "--resume_from_checkpoint", str(folder / "checkpoint-2")]


def test_the_best_checkpoint_and_every_baseline(tmp_path: Path):
    """Once the baseline was refused when all training was done, for options that were not the user's."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_strategy": "steps", "save_steps": 2}
    _, report = job(tmp_path, "full", eval_strategy="steps", eval_steps=2, **best)
    assert "multi-task LoRA" in report.curves


def test_a_baseline_that_is_stopped_leaves_the_run_s_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once it wrote its own among them, or over one of them, and the run went on from that."""
    original = MetaTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.args.algorithm == "multitask" and self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    saves = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    monkeypatch.setattr(MetaTrainer, "training_step", signalled)
    with pytest.raises(SystemExit) as ended:
        job(tmp_path, "full", **saves)
    monkeypatch.undo()
    assert ended.value.code == 143
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert Sidecar.read(checkpoint).algorithm == "maml"
    _, report = job(tmp_path, "full", resume_from_checkpoint="True", **saves)
    assert "multi-task LoRA" in report.curves


def test_a_baseline_does_not_go_on_from_the_run_s_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once it did where a launcher had started the job again."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    saves = {"save_strategy": "steps", "save_steps": 2}
    output, report = job(tmp_path, "full", **saves)
    (output / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    steps: list[tuple[str, int]] = []
    original = MetaTrainer.training_step

    def counted(self, *args, **kwargs):
        steps.append((self.args.algorithm, self.state.global_step))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MetaTrainer, "training_step", counted)
    _, again = job(tmp_path, "full", **saves)
    assert steps[0] == ("maml", 2), "its own checkpoint, which the baseline has not made an earlier job's"
    assert ("multitask", 0) in steps
    assert again.rows() == report.rows()


def test_a_schedule_that_follows_evaluations_and_starts_that_have_none(tmp_path: Path):
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau"}
    with pytest.raises(MetaPeftError, match=r"reduce_lr_on_plateau .* compared at equal compute have none"):
        job(tmp_path, "full", **evaluates)


def test_the_other_algorithms(tmp_path: Path):
    for algorithm in ("imaml", "reptile", "multitask"):
        (tmp_path / algorithm).mkdir()
        _, report = job(tmp_path / algorithm, algorithm=algorithm, proximal=0.1)
        assert len(report.rows()) == 4


def test_another_column_names_the_task(tmp_path: Path):
    file = write_jsonl(tmp_path / "train.jsonl", letter_tasks("ab"), column="family")
    assert load_tasks(TaskArguments(str(file)), "family")["train"].names == ["say a", "say b"]


@pytest.mark.parametrize("empty", [None, ""])
def test_rows_without_an_answer_are_left_out(tmp_path: Path, empty: str | None):
    """They are counted, and nothing of the run reads them."""
    files = {}
    for split, letters in (("train", TRAIN), ("validation", EVAL), ("test", TEST)):
        tasks = {name: [{"input": "abc", "target": empty}, *rows] for name, rows in letter_tasks(letters).items()}
        files[f"{split}_tasks"] = str(write_jsonl(tmp_path / f"{split}.jsonl", tasks))
    model = ModelArguments(str(tiny_folder()), lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    options = TaskArguments(**files, empty_rows="leave_out")
    report = run(model, options, config(tmp_path / "out"), CompareArguments("plain", [0, 1], [1.0]))
    assert report.run["data"]["train"]["empty_rows"] == len(TRAIN)
    assert_usable(tmp_path / "out")


def test_a_task_in_two_splits(tmp_path: Path):
    files = [
        str(write_jsonl(tmp_path / f"{i}.jsonl", letter_tasks(letters))) for i, letters in enumerate(("ab", "cd", "de"))
    ]
    with pytest.raises(MetaPeftError, match="1 tasks are in both the validation and the test tasks, 'say d' for one"):
        load_tasks(TaskArguments(*files), "task")
    with pytest.raises(MetaPeftError, match="There is no file"):
        load_tasks(TaskArguments(str(tmp_path / "nothing.jsonl")), "task")


def test_too_few_rows_are_seen_before_the_model_is_loaded(tmp_path: Path):
    file = write_jsonl(tmp_path / "train.jsonl", letter_tasks("ab", n=3))
    with pytest.raises(MetaPeftError, match="'say a' has 3 distinct rows"):
        run(ModelArguments("no/such-model"), TaskArguments(str(file)), config(tmp_path / "out"), CompareArguments())


# Products of a row with a layer, 4 support and 8 query rows, 3 inner steps, 6 layers of which 2 are adapted.
# Multi-task: 12 rows through 4 layers once and through 2 layers forward and backward: 48 + 48 = 96.
