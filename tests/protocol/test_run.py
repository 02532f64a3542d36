"""A whole comparison on a tiny model: measured, stopped and gone on with, and its report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from surface import EVAL, TEST, TRAIN, base_model, config, letter_rows, letter_tasks, tiny_folder, write_jsonl

from meta_peft import MetaPeftError, ModelArguments, TaskArguments, adapt, load
from meta_peft.comparison.compare import CompareArguments
from meta_peft.comparison.early_stops import PARTS, stops_of, train_with_stops
from meta_peft.evaluation.evaluate import Start
from meta_peft.frozen.cache import FrozenCache
from meta_peft.protocol import ProtocolArguments, measure, run, starts
from meta_peft.protocol.arguments import TITLES
from meta_peft.protocol.cells import all_found
from meta_peft.protocol.summary import Summary
from meta_peft.protocol.task_heads import TaskHeadsTrainer
from meta_peft.protocol.verdict import verdict
from meta_peft.tasks import episodes
from meta_peft.training.trainer import MetaTrainer

STARTS = ["peft_defaults", "plain", "multitask", "reptile", "fomaml", "imaml", "meta", "in_context"]


def compared(
    folder: Path, *, base=None, splits=("train", "validation", "test"), protocol=(), layers=None, steps=2, **options
) -> Summary:
    letters = {"train": TRAIN, "validation": EVAL, "test": TEST}
    files = {f"{s}_tasks": str(write_jsonl(folder / f"{s}.jsonl", letter_tasks(letters[s]))) for s in splits}
    model = ModelArguments(
        str(base or tiny_folder()), lora_r=4, lora_target_modules=["q_proj", "v_proj"], lora_layers=layers
    )
    comparison = CompareArguments("full", [3, 0], [0.5, 2.0])
    args = config(folder / "out", max_steps=steps, learning_rate=0.01, **options)
    return run(model, TaskArguments(**files), args, comparison, ProtocolArguments(**{"seeds": [0], **dict(protocol)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, compared(folder, protocol={"seeds": [0, 1], "shots_curve": [1, 2], "task_counts": [4]})


def test_every_start_is_measured_for_every_seed(whole: tuple[Path, Summary]):
    folder, summary = whole
    assert (summary.seeds, summary.starts, summary.at) == ((0, 1), STARTS, 3)
    trained = ["multitask", "reptile", "fomaml", "imaml", "meta"]
    names = {found.cell.name for found in all_found(folder / "out")}
    assert names == {
        *(f"seed{seed}-{start}" for seed in (0, 1) for start in STARTS),
        *(f"seed{seed}-{start}-4tasks" for seed in (0, 1) for start in trained),
    }
    assert not summary.by_earlier_protocols
    curves = summary.report.curves
    assert {tuple(curve.steps) for curve in curves.values()} == {(0, 3)}
    before, after = ({name: curve.loss[:, i].mean() for name, curve in curves.items()} for i in (0, 1))
    assert len(set(after.values())) == len(curves), "every start is another one"
    assert before["multi-task LoRA"] < before["plain LoRA"] == before["PEFT's defaults"]
    assert {start: set(by_shots) for start, by_shots in summary.along_shots().items()} == {s: {1, 2} for s in STARTS}
    assert {start: set(by_count) for start, by_count in summary.along_tasks().items()} == {s: {4, 8} for s in trained}


def test_scores_with_other_numbers_of_examples_are_of_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once they were in the order of how long their own support rows are, and read in the order of the cell's."""
    measured_of: list[list[str]] = []
    real = measure._after

    def after(trainer, start, episodes, *args):
        measured_of.append([episode.task for episode in episodes])
        return real(trainer, start, episodes, *args)

    monkeypatch.setattr(measure, "_after", after)
    monkeypatch.setattr(episodes, "row_length", lambda row: sum(row["input_ids"]))  # all are equally long here
    (found,) = compared(tmp_path, protocol={"starts": ["plain"], "shots_curve": [1, 6]}).found
    assert measured_of == [found.tasks] * 2


def test_a_start_that_a_signal_stopped_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once it was: half a training stood in the report as a whole one."""
    step = MetaTrainer.training_step

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(MetaTrainer, "training_step", stopped)
    with pytest.raises(SystemExit) as ended:
        compared(tmp_path, protocol={"starts": ["plain", "meta"]})
    assert ended.value.code == 128 + signal.SIGTERM
    assert [found.cell.start for found in all_found(tmp_path / "out")] == ["plain"]


def test_all_starts_may_adapt_all_weights_where_the_run_adapts_some(tmp_path: Path):
    """By whichever rule is better on the validation tasks; steps of 1e-9 do nothing."""
    options = {"fast_weights": r"layers\.1\..*lora_B", "inner_optimizer": "sgd", "inner_lr": 1e-9}
    summary = compared(tmp_path, protocol={"starts": ["plain", "multitask", "reptile", "meta"]}, **options)
    rules = {found.cell.start: dict(zip(found.steps, found.how, strict=True)) for found in summary.found}
    assert rules["plain"] == {0: "", 3: "Adam on all weights"}, "where both are the same, the run's own"
    assert len(rules) == 4
    for start, rule in rules.items():
        assert rule[3].endswith("Adam on all weights")
        curve = summary.report.curves[TITLES[start]]
        assert curve.loss[:, 1].mean() < curve.loss[:, 0].mean() - 0.01


def test_what_is_trained_may_stop_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a learning rate that ruins it after a quarter of the training, the quarter is chosen, saved, and said so."""
    made = training_of(monkeypatch)
    real = MetaTrainer.training_step

    def step(trainer: MetaTrainer, *args, **kwargs):
        if trainer.state.global_step >= min(stops_of(trainer.args)):
            for group in trainer.optimizer.param_groups:
                group["lr"] = 100.0
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(MetaTrainer, "training_step", step)
    summary = compared(tmp_path, protocol={"starts": ["plain", "multitask", "fomaml", "meta"]}, steps=4)
    quarter, half = PARTS
    found = {found.cell.start: found for found in summary.found}
    trained = ("multitask", "fomaml", "meta")
    assert {found[start].how[1] for start in trained} == {quarter}
    assert found["plain"].how == ["", ""], "it is not trained"
    assert set(found["plain"].along_training) == {"1"}
    for start in trained:
        along = {float(part): losses[1] for part, losses in found[start].along_training.items()}
        assert set(along) == {*PARTS.values(), 1.0}
        assert all(along[part] is None or along[part] > along[0.25] for part in (0.5, 1.0)), "None is no finite loss"
        assert summary.along_training()[start] == along
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count(f", {quarter} |") == 3  # nothing is adapted after 0 steps
    for (trainer, stops), start in zip(made, trained, strict=True):
        assert [stop.how for stop in stops] == ["", quarter, half]
        folder = tmp_path / "out" / "starts" / f"seed0-{start}"
        saved = load_file(folder / "adapter_model.safetensors")
        for name, value in chosen(summary, start, stops).adapter.items():
            assert torch.equal(saved[name], value)
            assert not torch.equal(stops[0].adapter[name], value)
        sidecar = load(None, folder).meta_peft.sidecar
        chosen_for = zip(found[start].steps, found[start].factors, found[start].how, strict=True)
        assert sidecar.rate_factors == {step: factor for step, factor, how in chosen_for if step and how == quarter}
        torch.testing.assert_close(sidecar.log_rates, stops[1].hyper["log_rates"])
        assert found[start].cost["outer_steps"] == trainer.args.max_steps, "the cost is that of the whole training"


def test_all_cells_share_a_frozen_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the same results; LoRA on all layers, as PEFT's defaults have it, has nothing to keep."""
    kept = []
    real = FrozenCache._keep
    monkeypatch.setattr(FrozenCache, "_keep", lambda cache, *row: (kept.append(row[0]), real(cache, *row)))
    protocol = {"starts": ["peft_defaults", "plain", "multitask", "meta"]}
    found = {}
    for gb in (0, 0.1):
        folder = tmp_path / str(gb)
        folder.mkdir()
        found[gb] = compared(folder, protocol=protocol, layers=[1], frozen_cache_gb=gb)
    assert len(kept) == len(set(kept)) > 0
    for name, curve in found[0].report.curves.items():
        np.testing.assert_allclose(found[0.1].report.curves[name].loss, curve.loss, atol=1e-3)


def of_classes(folder: Path, protocol=(), label=str, **options) -> Summary:
    """Tasks of three classes each; the classes of the splits are different ones."""
    letters = {"train": "abcdefghi", "validation": "jkl", "test": "mnopqr"}
    files = {}
    for split, names in letters.items():
        tasks = {names[i : i + 3]: names[i : i + 3] for i in range(0, len(names), 3)}
        rows = {t: [{"text": f"{c}{n}{c}", "label": label(c)} for c in cs for n in range(6)] for t, cs in tasks.items()}
        files[f"{split}_tasks"] = str(write_jsonl(folder / f"{split}.jsonl", rows))
    how = {"objective": "sequence_classification", "num_labels": 3, "lora_target_modules": ["q_proj", "v_proj"]}
    rule = {"fast_weights": "score", "inner_optimizer": "sgd", "inner_lr": 0.05, "prompt_template": "{input}"}
    args = config(folder / "out", ways=3, label_words="permuted", shots=2, query_size=2, max_steps=6, **rule, **options)
    comparison = CompareArguments("plain", [0, 3], [1.0])
    model = ModelArguments(str(tiny_folder()), **how)
    return run(model, TaskArguments(**files), args, comparison, ProtocolArguments(**{"seeds": [0], **dict(protocol)}))


def training_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MetaTrainer, list[Start]]]:
    """Each trainer of a start that may stop early, with what it was at its end and before."""
    made = []

    def train(trainer: MetaTrainer, name: str) -> list[Start]:
        made.append((trainer, train_with_stops(trainer, name)))
        return made[-1][1]

    monkeypatch.setattr(starts, "train_with_stops", train)
    return made


def chosen(summary: Summary, start: str, stops: list[Start]) -> Start:
    """The one that the validation tasks chose for the number of steps that is compared."""
    (found,) = summary.of_start(start)
    how = found.how[found.steps.index(summary.at)].removesuffix("Adam on all weights").removesuffix(", ")
    return next(stop for stop in stops if stop.how == how)


def test_one_classifier_of_all_labels_whose_head_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = training_of(monkeypatch)
    summary = of_classes(tmp_path, {"starts": ["plain", "multitask", "classifier", "meta"]})
    (multitask, _), (classifier, stops), _ = made
    names, none = (trainer.encoding.facts.label_names for trainer in (classifier, multitask))
    assert (classifier.args.algorithm, "".join(names), none) == ("multitask", "abcdefghi", ())
    trained = chosen(summary, "classifier", stops).adapter
    saved = load_file(tmp_path / "out" / "starts" / "seed0-classifier" / "adapter_model.safetensors")
    head = next(name for name in saved if "score" in name)
    assert trained[head].shape[0] == 9
    assert saved[head].shape[0] == 3
    assert not saved[head].any(), "a new head, from zero"
    for name in set(saved) - {head}:
        assert torch.equal(saved[name], trained[name])
    cost = {start: summary.cost(start)["outer_steps"] for start in summary.starts}
    assert cost["classifier"] == cost["multitask"]
    title = "one classifier, new head"
    assert title in (tmp_path / "out" / "report.md").read_text()
    assert any(title in said for said in verdict(summary))


def test_a_head_for_each_training_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = training_of(monkeypatch)
    summary = of_classes(tmp_path, {"starts": ["plain", "multitask", "task_heads", "meta"]})
    ((trainer, stops),) = (each for each in made if isinstance(each[0], TaskHeadsTrainer))
    assert set(trainer.heads) == {"abc", "def", "ghi"}
    heads = [head for by_name in trainer.heads.values() for head in by_name.values()]
    assert [tuple(head.shape) for head in heads] == [(3, 64)] * 3, "classes of a task are numbered within it"
    assert len({head.sum().item() for head in heads}) == 3, "each learned by itself"
    saved = load_file(tmp_path / "out" / "starts" / "seed0-task_heads" / "adapter_model.safetensors")
    trained = chosen(summary, "task_heads", stops).adapter
    for name, value in saved.items():
        assert torch.equal(value, trained[name]), "the head that adapts is a new one, as the model's was all the time"
        assert bool(stops[0].adapter[name].any()) == ("score" not in name)
    cost = {start: summary.cost(start)["outer_steps"] for start in summary.starts}
    assert cost["task_heads"] == cost["multitask"]
    assert any("a head for each task" in said for said in verdict(summary))


def test_labels_that_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heads = []
    real = MetaTrainer.train
    monkeypatch.setattr(MetaTrainer, "train", lambda t: (heads.append(t.loss_fn.model.config.num_labels), real(t)))
    of_classes(tmp_path, {"starts": ["classifier", "task_heads"]}, label=lambda c: ord(c) % 3)
    assert heads == [3, 3]


def test_by_default_all_starts_that_there_can_be(tmp_path: Path):
    summary = of_classes(tmp_path)
    assert summary.starts == [start for start in TITLES if start != "in_context"]


@pytest.mark.parametrize(
    ("make", "start", "why"),
    [
        (of_classes, "in_context", "need a causal language model"),
        (compared, "classifier", "a classification head"),
        (compared, "task_heads", "a head for whole rows"),
    ],
)
def test_starts_that_cannot_be(tmp_path: Path, make, start: str, why: str):
    """Known before anything is measured."""
    with pytest.raises(MetaPeftError, match=f"starts: {start} cannot be compared here: .*{why}"):
        make(tmp_path, protocol={"starts": ["plain", start]})
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.parametrize("task_column", ["label", ["label"]])
def test_there_is_no_head_for_a_task_that_is_a_class(tmp_path: Path, task_column: str | list[str]):
    with pytest.raises(MetaPeftError, match=r"starts: task_heads cannot be compared here: .*tasks of several classes"):
        of_classes(tmp_path, {"starts": ["plain", "task_heads"]}, task_column=task_column)


def test_compute_is_equal(whole: tuple[Path, Summary]):
    _, summary = whole
    steps = {start: summary.cost(start)["outer_steps"] for start in summary.starts}
    assert steps["peft_defaults"] == steps["plain"] == steps["in_context"] == 0
    assert steps["multitask"] >= steps["fomaml"] > steps["meta"] == 2


def test_the_report_stands_alone(whole: tuple[Path, Summary]):
    folder, summary = whole
    page = (folder / "out" / "report.html").read_text()
    assert "<svg" in page
    assert not re.findall(r"(?:src|href)=\"(?!#)", page), "nothing is fetched"
    text = (folder / "out" / "report.md").read_text()
    for title in (
        "multi-task LoRA",
        "Reptile",
        "first-order MAML",
        "in-context examples",
        "Examples of a task",
        "Cost",
    ):
        assert title in page
        assert title in text
    values = json.loads((folder / "out" / "summary.json").read_text())
    assert values["seeds"] == [0, 1]
    assert len(values["rows"]) == 2 * (len(STARTS) - 1) + 1
    assert {d["other"] for d in values["differences"]} == set(STARTS) - {"meta"}
    assert len(values["along_shots"]["meta"]["1"]) == len(summary.tasks) == 4


def test_a_trained_start_can_be_used_with_its_rates(whole: tuple[Path, Summary]):
    folder, summary = whole
    model = load(None, folder / "out" / "starts" / "seed0-meta")
    found = next(f for f in summary.found if f.cell.name == "seed0-meta")
    chosen_for = zip(found.steps, found.factors, found.how, strict=True)
    assert model.meta_peft.sidecar.rate_factors == {
        step: factor for step, factor, how in chosen_for if step and how == found.how[found.steps.index(summary.at)]
    }
    _, metrics = adapt(model, letter_rows("p")[:2])
    assert metrics["support_loss_after"] < metrics["support_loss_before"]


def test_what_is_there_is_not_measured_again(tmp_path: Path, whole: tuple[Path, Summary]):
    folder = tmp_path
    first = compared(folder, protocol={"starts": ["plain", "meta"]})
    cells = folder / "out" / "cells"
    kept = cells / "seed0-plain.json"
    changed = json.loads(kept.read_text()) | {"loss": [[7.0, 7.0]] * 4}
    kept.write_text(json.dumps(changed))
    (cells / "seed0-meta.json").unlink()  # as if the run had been killed before
    again = compared(folder, protocol={"starts": ["plain", "meta"]})
    assert again.report.curves["plain LoRA"].loss.tolist() == [[7.0, 7.0]] * 4
    mine, its = (summary.report.curves["meta-learned LoRA"] for summary in (again, first))
    assert mine.loss.tolist() == its.loss.tolist()
    with pytest.raises(MetaPeftError, match="was measured with other options"):
        compared(folder, protocol={"starts": ["plain", "meta"]}, inner_steps=2)


@pytest.mark.parametrize("earlier", [False, True])
def test_rows_may_have_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool):
    """Cells that an earlier version measured had the names of files in them: they are read where they were."""
    protocol, there, here = {"starts": ["plain"]}, tmp_path / "there", tmp_path / "here"
    there.mkdir()
    with monkeypatch.context() as before:
        if earlier:
            before.setattr(import_module("meta_peft.protocol.run"), "FILES", ())
        first = compared(there, protocol=protocol)
    assert compared(there, protocol=protocol | {"measure": False}).found == first.found
    there.rename(here)
    with pytest.raises(MetaPeftError, match="other options or other data") if earlier else nullcontext():
        assert compared(here, protocol=protocol | {"measure": False}).found == first.found


@pytest.mark.parametrize("other", ["answers", "an option"])
def test_what_is_there_of_other_rows_or_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str):
    """Once as many rows with other answers, or another outer optimizer, went into one verdict with it."""
    compared(tmp_path, protocol={"starts": ["plain"]})
    options = {}
    if other == "an option":
        options["weight_decay"] = 0.5
    else:
        real = letter_rows
        monkeypatch.setattr(
            "surface.letter_rows", lambda letter, n=8: [row | {"target": "z"} for row in real(letter, n)]
        )
    with pytest.raises(MetaPeftError, match="was measured with other options or other data"):
        compared(tmp_path, protocol={"starts": ["plain", "meta"]}, **options)


def test_what_is_there_of_a_base_that_was_trained_on_since_is_refused(tmp_path: Path):
    """Once its cells went into one verdict with those of the weights that were there before."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(), base)
    compared(tmp_path, base=base, protocol={"starts": ["plain"]})
    model = base_model()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data.mul_(1.5)
    model.save_pretrained(base)
    with pytest.raises(MetaPeftError, match="was measured with other weights of the base, under the same name"):
        compared(tmp_path, base=base, protocol={"starts": ["plain", "meta"]})


def test_a_start_that_would_be_trained_for_longer_than_with_another_seed_is_refused(tmp_path: Path):
    """What is kept of the layers below the adapter counts as free, so that the same compute buys other outer steps."""
    of_seeds = {"starts": ["meta", "multitask"]}
    compared(tmp_path, protocol=of_seeds, layers=[1], steps=12)
    with pytest.raises(
        MetaPeftError, match=r"seed1-multitask is trained for \d+ outer steps, and this start for \d+ with"
    ):
        compared(tmp_path, protocol={**of_seeds, "seeds": [0, 1]}, layers=[1], steps=12, frozen_cache_gb=0.1)
    assert not (tmp_path / "out" / "starts" / "seed1-multitask").exists()


def test_what_makes_no_comparison_yet_is_measured_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Processes that share the work may each have a part of it; once the first to be ready ended in an error."""
    assert compared(tmp_path, protocol={"starts": ["in_context"]}) is None
    assert "there is no report yet. In-context examples have nothing to be compared with" in caplog.text
    assert compared(tmp_path, protocol={"starts": ["plain"], "seeds": [1]}) is None
    assert "there is no report yet. No seed has all its starts measured" in caplog.text
    assert [found.cell.name for found in all_found(tmp_path / "out")] == ["seed0-in_context", "seed1-plain"]
    with pytest.raises(MetaPeftError, match="No seed has all its starts"):
        compared(tmp_path, protocol={"starts": ["plain"], "measure": False})
    assert compared(tmp_path, protocol={"starts": ["plain"]}).seeds == (0,)


def test_a_curve_over_more_examples_than_tasks_have_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = training_of(monkeypatch)
    with pytest.raises(MetaPeftError, match="shots_curve goes up to 8, for which test tasks are too small: Task 'say"):
        compared(tmp_path, protocol={"starts": ["multitask"], "shots_curve": [1, 8]})
    assert not made


def test_fewer_training_tasks_than_an_episode_has_classes():
    arguments = ProtocolArguments(task_counts=[3, 2])
    arguments.check_task_counts(5)
    with pytest.raises(MetaPeftError, match=r"task_counts must be 3 or more, .* takes ways=3 of them; got 2\. Leave"):
        arguments.check_task_counts(5, 3)


def test_what_cannot_be_drawn_is_not_trained_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without matplotlib the whole training was done, and then its tuned rates were lost."""
    monkeypatch.setattr("meta_peft.evaluation.report.find_spec", lambda name: None)
    with pytest.raises(MetaPeftError, match="needs matplotlib"):
        compared(tmp_path, protocol={"starts": ["plain"]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("counts", [[99], [4, len(TRAIN)]])
def test_task_counts_that_are_no_fewer_than_all(tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    """Each start was trained again on all tasks, under a number that was not theirs; now no model is even loaded."""
    loaded = []
    monkeypatch.setattr(starts, "new_model", lambda *_: loaded.append(1))
    message = f"task_counts must be below the number of training tasks, 8, .*; got {counts[-1]}. Lower"
    with pytest.raises(MetaPeftError, match=message):
        compared(tmp_path, protocol={"starts": ["plain", "multitask"], "task_counts": counts})
    assert not loaded
    assert not (tmp_path / "out").exists()


def test_a_report_without_measuring(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="nothing measured"):
        compared(tmp_path, protocol={"measure": False})


@pytest.mark.parametrize(
    ("splits", "missing"), [(("train",), "validation and no test"), (("train", "test"), "validation")]
)
def test_splits_that_are_missing(tmp_path: Path, splits: tuple[str, ...], missing: str):
    with pytest.raises(MetaPeftError, match=f"There are no {missing} tasks"):
        compared(tmp_path, splits=splits)
