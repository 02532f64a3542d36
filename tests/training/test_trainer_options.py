from __future__ import annotations

from pathlib import Path

import pytest
from surface import EVAL, config, letter_tasks, lora, peft_model, tiny_tokenizer, trainer

from meta_peft import MetaPeftError, MetaTrainer
from meta_peft.training.trainer_options import check_best_metric, check_evaluation, check_optimizer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type=cosine_with_min_lr with lr_scheduler_kwargs=None cannot be made: One of min_lr or"
            ".*Correct lr_scheduler_kwargs, or choose another lr_scheduler_type",
        ),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"a": 1}},
            r"lr_scheduler_type=linear with lr_scheduler_kwargs=\{'a': 1\} cannot be made: .* argument 'a'\. Correct",
        ),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_made(tmp_path: Path, options: dict, said: str):
    with pytest.raises(MetaPeftError, match=said):
        check_optimizer(config(tmp_path, **options))
    check_optimizer(config(tmp_path, **options), given=(None, object()))


def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object) -> None:
        raise ImportError("You need to install `new_optimizer`.")

    monkeypatch.setattr(
        "meta_peft.training.trainer_options.CheckpointedTrainer.get_optimizer_cls_and_kwargs", staticmethod(missing)
    )
    with pytest.raises(
        MetaPeftError, match=r"optim=adamw_torch.* cannot be made: You need to install `new_optimizer`\."
    ):
        check_optimizer(config(tmp_path))
    check_optimizer(config(tmp_path), given=(object(), None))


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit"])
@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "inverse_sqrt"])
def test_what_can_be_made(tmp_path: Path, kind: str, schedule: str):
    check_optimizer(config(tmp_path, optim=kind, lr_scheduler_type=schedule))
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    check_optimizer(config(tmp_path, optim=kind, **options))


def test_an_evaluation_without_tasks(tmp_path: Path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=1)
    said = "eval_strategy=steps evaluates on validation tasks, and there are none: give validation_tasks"
    with pytest.raises(MetaPeftError, match=said):
        check_evaluation(args, validation=False)
    check_evaluation(args, validation=True)
    check_evaluation(config(tmp_path), validation=False)
    with pytest.raises(MetaPeftError, match=said):  # before a model is looked for
        MetaTrainer("no/such-model", args, letter_tasks("ab"), peft_config=lora(), processing_class=tiny_tokenizer())


def test_the_best_of_what_is_never_evaluated(tmp_path: Path):
    """Once the last adapter was saved as the best one."""
    args = config(tmp_path, load_best_model_at_end=True)
    with pytest.raises(MetaPeftError, match="eval_strategy=no evaluates none: set eval_strategy and save_strategy"):
        check_evaluation(args, validation=True)


@pytest.mark.parametrize(
    "options", [{"eval_strategy": "steps", "eval_steps": 1}, {"metric_for_best_model": "loss"}], ids=str
)
def test_checkpoints_where_it_is_best_need_to_know_of_what(tmp_path: Path, options: dict):
    """Once it was a traceback after the base was loaded, or no checkpoint at all."""
    with pytest.raises(
        MetaPeftError, match="save_strategy=best saves a checkpoint where an evaluation is the best so far"
    ):
        check_evaluation(config(tmp_path, **{"save_strategy": "best"} | options), validation=True)
    check_evaluation(
        config(tmp_path, save_strategy="best", metric_for_best_model="loss", eval_strategy="steps", eval_steps=1),
        validation=True,
    )


def test_the_best_by_what_is_not_measured(tmp_path: Path):
    evaluates = {"eval_strategy": "steps", "eval_steps": 1}
    named = config(tmp_path, metric_for_best_model="eval_accuracy", **evaluates)
    said = (
        "metric_for_best_model=eval_accuracy is not measured: an evaluation gives loss, loss_before, worst_loss, exact_"
    )
    with pytest.raises(MetaPeftError, match=said):
        check_best_metric(named, "causal_lm")
    check_best_metric(named, "sequence_classification")
    check_best_metric(config(tmp_path, metric_for_best_model="accuracy", metric="accuracy", **evaluates), "causal_lm")
    check_best_metric(config(tmp_path, metric_for_best_model="accuracy"), "causal_lm")
    for name in ("loss", "eval_loss", "worst_loss", "eval_loss_before", "exact_match"):
        check_best_metric(config(tmp_path, metric_for_best_model=name, **evaluates), "causal_lm")
    with pytest.raises(MetaPeftError, match=said):
        MetaTrainer(
            peft_model(),
            named,
            letter_tasks("ab"),
            eval_dataset=letter_tasks(EVAL),
            processing_class=tiny_tokenizer(),
        )


def test_what_is_measured_is_what_an_evaluation_gives(tmp_path: Path):
    run = trainer(tmp_path, eval_tasks=letter_tasks(EVAL))
    assert set(run.evaluate()) == {"eval_loss", "eval_loss_before", "eval_worst_loss", "eval_exact_match"}
