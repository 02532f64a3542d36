from __future__ import annotations

import json
from pathlib import Path

import kinds
import numpy as np
import pytest
import torch
from surface import TRAIN, bits, letter_tasks, tiny_folder, trainer, write_jsonl

from meta_peft import EpisodeDataset, MetaPeftError, TaskSet
from meta_peft.cli import main
from meta_peft.comparison.task_report import (
    TaskReportArguments,
    cosines,
    group_gradients,
    grouped,
    task_report,
    without,
)
from meta_peft.outer_loop.outer_loop import meta_gradient

OPTIONS = {"inner_steps": 1, "inner_optimizer": "sgd", "inner_lr": 0.1}


def contrary(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same questions, all answered by letters that no other task answers with."""
    return [{**row, "target": "zz"} for row in rows]


def test_without_is_what_leaving_out_does_to_first_order():
    """Against two outer steps of plain gradient descent on a quadratic, with all groups and with all but one."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    target = torch.randn(9, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    found = without(gradients, -target, sizes)  # the gradient of |w - target|^2 / 2 at w = 0

    def loss_after(kept: list[int], rate: float) -> torch.Tensor:
        share = sizes[kept] / sizes[kept].sum()
        return ((-rate * share @ gradients[kept] - target) ** 2).sum() / 2

    rate = 1e-7
    for out in range(4):
        rest = [i for i in range(4) if i != out]
        exact = (loss_after(rest, rate) - loss_after(list(range(4)), rate)) / rate
        assert float(found[out]) == pytest.approx(float(exact), rel=1e-5)
    assert without(gradients[:1], target, sizes[:1]).tolist() == [0.0]


def test_cosines():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert cosines(a, a).flatten().tolist() == pytest.approx([1, 0.5**0.5, 0, 0.5**0.5, 1, 0, 0, 0, 0])


def test_groups_by_a_pattern():
    names = ["de/date", "de/time", "fr/date", "plain"]
    assert grouped(names, None) == {name: [name] for name in names}
    assert grouped(names, "[^/]+$") == {"date": ["de/date", "fr/date"], "time": ["de/time"], "plain": ["plain"]}
    assert grouped(names, "^[a-z]+(?=/)") == {"de": ["de/date", "de/time"], "fr": ["fr/date"], "plain": ["plain"]}
    with pytest.raises(MetaPeftError, match="group_pattern='\\[' is not a regular expression"):
        grouped(names, "[")


def test_gradients_are_means_over_groups(tmp_path: Path):
    tasks = TaskSet.from_mapping(letter_tasks("abc"))
    run = trainer(tmp_path, tasks=letter_tasks("abc"), **OPTIONS)
    groups = {"a and c": ["say a", "say c"], "b": ["say b"]}
    found = group_gradients(run, tasks, groups, episodes=2)
    assert found.dtype == torch.float64
    each = EpisodeDataset(run.train_dataset.tasks, shots=2, query_size=2, seed=42, length=6, shuffle=False)
    by_task = {}
    for episode in (each[i] for i in range(6)):
        gradient = meta_gradient(run.loss_fn, run.data_collator([episode]), run.algorithm, run.rates)
        by_task.setdefault(episode.task, []).append(torch.cat([g.flatten() for g in gradient.grads.adapter.values()]))
    for gradient, names in zip(found, groups.values(), strict=True):
        expected = torch.stack([torch.stack(by_task[name]).double().mean(0) for name in names]).mean(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_weights_that_training_holds_do_not_count(tmp_path: Path):
    """The start of a head whose classes change places: an untrained one has nearly all of the gradient."""
    options = {"ways": 2, "label_words": "permuted", "shots": 1, "query_size": 1}
    run = kinds.trainer(kinds.HEAD, tmp_path, **options)
    assert run.fixed
    tasks = TaskSet.from_mapping(kinds.tasks(kinds.HEAD, "ab"))
    (found,) = group_gradients(run, tasks, {"all": tasks.names}, episodes=1)
    moved = {name: p for name, p in run.loss_fn.weights.parameters().items() if name not in run.fixed}
    assert len(found) == sum(p.numel() for p in moved.values())


def test_a_task_that_pulls_elsewhere_shows(tmp_path: Path):
    letters = letter_tasks("ab", n=10)
    tasks = {"same": letters["say a"][:5], "other": contrary(letters["say b"])}
    validation = {"held out": [{**row, "target": "aa"} for row in letters["say b"]]}
    run = trainer(tmp_path, tasks=tasks, inner_lr=0.0, algorithm="multitask", shots=2, query_size=2)
    report = task_report(run, TaskSet.from_mapping(tasks), TaskSet.from_mapping(validation), TaskReportArguments())
    by_name = {row["group"]: row for row in report.rows()}
    assert by_name["same"]["cosine_with_validation"] > 0.5 > by_name["other"]["cosine_with_validation"]
    assert by_name["same"]["without"] > 0 > by_name["other"]["without"]
    assert [row["group"] for row in report.rows()] == ["same", "other"]
    assert by_name["same"]["most_opposed"] == "other"


def test_retraining_without_each_group_leaves_the_trainer_as_it_was(tmp_path: Path):
    tasks = letter_tasks("abc")
    run = trainer(tmp_path, tasks=tasks, **OPTIONS)
    before = bits(dict(run.loss_fn.weights.parameters()))
    arguments = TaskReportArguments(leave_out_steps=1, group_pattern="[ab]$", episodes_per_task=1)
    validation = TaskSet.from_mapping(letter_tasks("xy"))
    report = task_report(run, TaskSet.from_mapping(tasks), validation, arguments)
    assert bits(dict(run.loss_fn.weights.parameters())) == before
    assert list(report.retrained) == list(report.groups) == ["a", "b", "say c"]
    for mean, low, high in report.retrained.values():
        assert low <= mean <= high
    assert any(mean != 0 for mean, _, _ in report.retrained.values())
    assert "loss when retrained without" in report.markdown()
    with pytest.raises(MetaPeftError, match="one group alone, so none can be left out"):
        task_report(
            run, TaskSet.from_mapping(tasks), validation, TaskReportArguments(leave_out_steps=1, group_pattern="say")
        )


# ---- the command


def words(tmp_path: Path, *more: str) -> list[str]:
    for split, letters in (("train", TRAIN[:3]), ("validation", "ij")):
        write_jsonl(tmp_path / f"{split}.jsonl", letter_tasks(letters))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_folder()}\noutput_dir: {tmp_path}/out\ntrain_tasks: {tmp_path}/train.jsonl\n"
        f"validation_tasks: {tmp_path}/validation.jsonl\nshots: 2\nquery_size: 2\ninner_steps: 1\nlora_r: 4\n"
        "max_length: 32\nmax_steps: 2\nper_device_train_batch_size: 2\nsave_strategy: 'no'\nreport_to: none\n"
        "use_cpu: true\nadaptation_steps: [0, 2]\n"
    )
    return ["tasks", "--config", str(config), "--report_dir", str(tmp_path / "report"), *more]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(words(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "| group | tasks | cosine with validation |" in shown
    assert (tmp_path / "report" / "report.md").read_text().strip() in shown
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert sorted(row["group"] for row in found["rows"]) == ["say a", "say b", "say c"]
    matrix = np.array(found["cosines"])
    assert matrix.shape == (3, 3)
    assert np.diag(matrix) == pytest.approx([1, 1, 1])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert found["leakage"]["tasks"] == []
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.json", "report.md"]


def test_from_a_trained_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = words(tmp_path)
    assert main(["train", *given[1:3], "--compare", "none"]) == 0
    assert main([*given, "--adapter", str(tmp_path / "out")]) == 0
    trained = json.loads((tmp_path / "report" / "report.json").read_text())
    assert trained["run"]["adapter"] == str(tmp_path / "out")
    assert main(given) == 0
    untrained = json.loads((tmp_path / "report" / "report.json").read_text())
    assert trained["cosines"] != untrained["cosines"]
    capsys.readouterr()


def test_a_config_whose_training_evaluates(tmp_path: Path):
    assert main([*words(tmp_path), "--eval_strategy", "steps", "--eval_steps", "1"]) == 0


def test_help_is_one_page(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["tasks", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--leave_out_steps" in shown
    assert "--group_pattern" in shown
    assert "--inner_steps" not in shown
    assert len(shown.splitlines()) < 50


def test_validation_tasks_have_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = words(tmp_path)
    config = Path(given[2])
    config.write_text(
        "".join(line for line in config.read_text().splitlines(True) if not line.startswith("validation_tasks"))
    )
    assert main(given) == 2
    assert "give validation_tasks" in capsys.readouterr().err
