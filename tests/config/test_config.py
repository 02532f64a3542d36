from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from surface import config
from transformers import TrainingArguments

from meta_peft import (
    MAML,
    SGD,
    Adam,
    ImplicitMAML,
    MetaLoraConfig,
    MetaPeftError,
    ModelArguments,
    MultiTask,
    Reptile,
    TaskArguments,
)
from meta_peft.comparison.compare import CompareArguments
from meta_peft.outer_loop.schedule import Schedule

# ---- what is refused, and how it is said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": -1}, "inner_steps must be a number of 0 or more; got -1"),
        ({"inner_steps": 0, "algorithm": "reptile"}, "inner_steps must be a number of 1 or more; got 0"),
        ({"shots": 0}, "shots must be a number of 1 or more; got 0"),
        ({"shots": "four"}, "shots must be a number of 1 or more; got 'four'"),
        ({"query_size": 0}, "query_size must be a number of 1 or more; got 0"),
        ({"eval_query_size": 0}, "eval_query_size must be a number of 1 or more; got 0"),
        ({"max_length": 3}, "max_length must be a number of 4 or more; got 3"),
        ({"tasks_per_forward": 0}, "tasks_per_forward must be a number of 1 or more; got 0"),
        ({"multitask_warmup_steps": -1}, "multitask_warmup_steps must be a number of 0 or more; got -1"),
        ({"inner_lr_learning_rate": math.nan}, "inner_lr_learning_rate must be a number of 0 or more; got nan"),
        ({"inner_adam_eps_root": -1e-9}, "inner_adam_eps_root must be a number of 0 or more"),
        ({"inner_momentum": -0.5}, "inner_momentum must be a number of 0 or more"),
        ({"inner_steps": True}, "inner_steps must be a number of 0 or more; got True"),
        ({"inner_steps": 10**9}, "inner_steps must be 0 or more, got 1000000000: a whole number of at most 10000"),
        ({"inner_steps": 1.5}, "inner_steps must be 0 or more, got 1.5: a whole number"),
        ({"learning_rate": math.nan}, "learning_rate must be a number of 0 or more; got nan"),
        ({"seed": -1}, "seed must be a number of 0 or more; got -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a number of 1 or more; got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be a number of 1 or more; got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a number of 1 or more; got 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be a number of 0 or more; got -1"),
        (
            {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0},
            "dataloader_prefetch_factor must be a number of 1 or more; got 0",
        ),
        ({"adam_beta1": 2.0}, "adam_beta1 must be a number of 0 or more and below 1; got 2.0"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be a number of 0 or more and below 1; got 1.0"),
        ({"adam_epsilon": -1.0}, "adam_epsilon must be a number of 0 or more; got -1.0"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw is refused: it follows a backward pass through the layers"),
        ({"optim": "lomo"}, "optim=lomo is refused"),
        ({"inner_lr": -1.0}, "inner_lr must be a finite number of 0 or more, got -1.0"),
        ({"inner_lr": math.inf}, "inner_lr must be a finite number of 0 or more, got inf"),
        ({"inner_lr": 0.0}, "inner_lr is 0: learned rates need a positive rate to start from"),
        (
            {"algorithm": "mamo"},
            "algorithm must be one of maml, fomaml, imaml, reptile, multitask; got 'mamo'. Did you mean 'maml'?",
        ),
        ({"algorithm": "x"}, "got 'x'.$"),
        ({"inner_optimizer": "adamw"}, "inner_optimizer must be one of sgd, adam; got 'adamw'. Did you mean 'adam'?"),
        ({"bf16": True}, "bf16 is refused: it would change nothing.*dtype: bfloat16"),
        ({"bf16_full_eval": True}, "bf16_full_eval and fp16_full_eval are refused"),
        ({"data_seed": 5}, r"data_seed=5 is refused: .* episodes are drawn from seed \(42\)"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is refused"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen is refused"),
        ({"use_liger_kernel": True}, "use_liger_kernel is refused: Liger's kernels have no second derivative"),
        ({"num_train_epochs": 5}, "num_train_epochs is refused.*Set max_steps"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor and neftune_noise_alpha are refused"),
        ({"report_to": "tensorbord"}, "report_to must be one of .*; got 'tensorbord'. Did you mean 'tensorboard'"),
        ({"report_to": ["tensorboard", "clearml"]}, "report_to names clearml, which is not installed: install it, or"),
        ({"neftune_noise_alpha": 5.0}, "label_smoothing_factor and neftune_noise_alpha are refused"),
        (
            {"fp16": True},
            "fp16 is refused: gradient scaling does not reach the inner loop.*Load the base in bfloat16",
        ),
        (
            {"remove_unused_columns": True},
            "remove_unused_columns would drop the support and query rows: leave it false",
        ),
        ({"inner_weight_decay": -0.1}, "inner_weight_decay must be a number of 0 or more; got -0.1"),
        ({"inner_max_grad_norm": 0.0}, "inner_max_grad_norm must be positive, or None for no clipping; got 0.0"),
        ({"inner_max_grad_norm": math.nan}, "inner_max_grad_norm must be positive"),
        ({"fast_weights": "(lora_B"}, r"fast_weights='\(lora_B' is not a regular expression: .*unterminated"),
        ({"fast_weights": "lora_B", "algorithm": "reptile"}, "no gradient for slow weights: leave fast_weights out"),
        ({"second_order_steps": -1}, "second_order_steps must be a number of 0 or more; got -1"),
        (
            {"second_order_steps": -1, "algorithm": "reptile"},
            "second_order_steps must be a number of 0 or more; got -1",
        ),
        ({"first_order_until": -1}, "first_order_until must be a number of 0 or more; got -1"),
        ({"multi_step_until": -1}, "multi_step_until must be a number of 0 or more; got -1"),
        ({"proximal": -1.0}, "proximal must be a number of 0 or more; got -1.0"),
        ({"proximal": math.inf}, "proximal must be a number of 0 or more; got inf"),
        ({"algorithm": "imaml"}, r"needs the pull towards the start: set proximal \(lambda\) above 0"),
        ({"algorithm": "imaml", "proximal": 1.0, "inner_steps": 0}, "inner_steps must be a number of 1 or more; got 0"),
        (
            {"algorithm": "imaml", "proximal": 1.0, "inner_weight_decay": 0.1},
            "which is not where weight decay leads: set inner_weight_decay to 0",
        ),
        ({"implicit_solver": "gc"}, "implicit_solver must be one of cg, neumann; got 'gc'."),
        ({"metric": "F1"}, "metric must be one of exact_match, accuracy, .*; got 'F1'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a number of 1 or more; got 0"),
        ({"choice_score": "average"}, "choice_score must be one of sum, mean; got 'average'."),
        ({"implicit_iterations": 0}, "implicit_iterations must be a number of 1 or more; got 0"),
        (
            {"memory": "reply"},
            "memory must be one of auto, unrolled, replay, finite_differences, or a number of inner steps; got 'reply'."
            " Did you mean 'replay'?",
        ),
        ({"memory": "reply", "algorithm": "fomaml"}, "memory must be one of auto, .*got 'reply'"),
        ({"memory": "-1"}, "or a number of inner steps; got -1"),
        ({"memory": "1.5"}, "or a number of inner steps; got '1.5'"),
        ({"memory_budget_gb": 0.0}, "memory_budget_gb must be positive; got 0.0"),
        ({"memory_budget_gb": -2.0}, "memory_budget_gb must be positive; got -2.0"),
        ({"memory_budget_gb": math.nan}, "memory_budget_gb must be positive; got nan"),
        ({"max_steps": -1}, "max_steps must be 1 or more, got -1: episodes have no epochs"),
        ({"max_steps": 0}, "max_steps must be 1 or more, got 0"),
        ({"fsdp": "full_shard"}, "options fsdp and deepspeed are refused: they would wrap the whole model"),
        ({"torch_compile": True}, "torch_compile is refused: compiled code has no second derivative. Leave it off"),
        ({"prompt_template": "Question"}, r"prompt_template must contain \{input\}, got 'Question'"),
        ({"completion_template": "{input}"}, r"completion_template must contain \{target\}"),
    ],
)
def test_training_options(tmp_path: Path, options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype=float16 is refused: gradient scaling.*Use bfloat16 or float32"),
        ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16; got 'bf16'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both set: choose one"),
        ({"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type must be one of nf4, fp4; got 'nf5'. Did you mean 'nf4'?"),
        ({"lora_dropout": 1.5}, "lora_dropout must be a number from 0 to 1; got 1.5"),
        ({"lora_dropout": math.nan}, "lora_dropout must be a number from 0 to 1; got nan"),
        ({"lora_r": 0}, "lora_r must be a number of 1 or more; got 0"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0, since LoRA is multiplied by it; got 0"),
        ({"lora_alpha": -16}, "lora_alpha must be a number above 0, .*; got -16"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number above 0, .*; got nan"),
        (
            {"lora_target_modules": ["all-linear"], "lora_layers": [1]},
            "lora_target_modules=all-linear is for all layers, and lora_layers chooses some: name the linear layers",
        ),
        ({"lora_target_modules": "all-linear", "lora_layers": [1]}, "lora_target_modules=all-linear is for all layers"),
    ],
)
def test_model_options(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        ModelArguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "all"}, "compare must be one of none, plain, full; got 'all'"),
        ({"adaptation_steps": []}, r"adaptation_steps must be numbers of 0 or more; got \[\]"),
        ({"adaptation_steps": [0, -1]}, r"adaptation_steps must be numbers of 0 or more; got \[0, -1\]"),
        ({"rate_factors": [float("nan")]}, r"rate_factors must be positive numbers; got \[nan\]"),
        ({"max_test_tasks": 0}, "max_test_tasks must be a number of 1 or more; got 0"),
        ({"rate_factors": []}, r"rate_factors must be positive numbers; got \[\]"),
        ({"rate_factors": [1.0, 0.0]}, r"rate_factors must be positive numbers; got \[1.0, 0.0\]"),
    ],
)
def test_comparison_options(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        CompareArguments(**options)


# ---- what the options make


def test_defaults_are_usable():
    args = MetaLoraConfig()
    assert isinstance(args, TrainingArguments)
    assert (args.algorithm, args.max_steps, args.per_device_train_batch_size) == ("maml", 100, 4)
    assert args.remove_unused_columns is False
    ModelArguments()
    TaskArguments()
    CompareArguments()


def test_inner_rule(tmp_path: Path):
    rule = config(tmp_path, inner_lr=0.5, inner_steps=4, inner_lr_per_step=True, inner_adam_eps_root=1e-5).inner_rule()
    assert rule.optimizer == Adam(eps_root=1e-5)
    assert (rule.lr, rule.steps, rule.learn_rates, rule.rates_per_step) == (0.5, 4, True, True)
    rule = config(
        tmp_path, inner_optimizer="sgd", inner_momentum=0.9, learn_inner_lr=False, inner_lr_per_step=True
    ).inner_rule()
    assert rule.optimizer == SGD(momentum=0.9)
    assert (rule.learn_rates, rule.rates_per_step) == (False, False)
    assert config(tmp_path, inner_lr=0.0, learn_inner_lr=False).inner_rule().lr == 0


def test_everything_of_the_inner_rule(tmp_path: Path):
    options = {"inner_weight_decay": 0.1, "inner_max_grad_norm": 0.5, "fast_weights": "lora_B", "proximal": 2.0}
    rule = config(tmp_path, inner_lr_per_entry=True, **options).inner_rule()
    assert rule.optimizer == Adam(weight_decay=0.1)
    assert (rule.clip, rule.fast, rule.proximal, rule.rates_per_entry) == (0.5, "lora_B", 2.0, True)
    plain = config(tmp_path).inner_rule()
    assert (plain.clip, plain.fast, plain.proximal, plain.rates_per_entry) == (None, None, 0.0, False)
    fixed = config(tmp_path, inner_lr_per_entry=True, learn_inner_lr=False).inner_rule()
    assert not fixed.rates_per_entry


@pytest.mark.parametrize(
    ("name", "kind", "second_order", "learned"),
    [
        ("maml", MAML, True, True),
        ("fomaml", MAML, False, True),
        ("imaml", ImplicitMAML, True, False),
        ("reptile", Reptile, False, False),
        ("multitask", MultiTask, False, False),
    ],
)
def test_algorithms(tmp_path: Path, name: str, kind: type, second_order: bool, learned: bool):
    args = config(tmp_path, algorithm=name, proximal=1.0 if name == "imaml" else 0.0)
    algorithm = args.algorithm_object()
    assert type(algorithm) is kind
    assert algorithm.second_order is second_order
    assert algorithm.inner == args.inner_rule()
    assert algorithm.inner.learn_rates is learned
    assert args.schedule() == Schedule(algorithm)


def test_options_of_maml(tmp_path: Path):
    made = config(tmp_path, second_order_steps=2, memory="replay").algorithm_object()
    assert (made.second_order_steps, made.memory, made.first_order) == (2, "replay", False)
    assert not config(tmp_path, second_order_steps=0).algorithm_object().second_order
    assert config(tmp_path).algorithm_object() == MAML(config(tmp_path).inner_rule())


@pytest.mark.parametrize(
    ("given", "made"), [("2", 2), ("0", 0), (3, 3), ("auto", "auto"), ("finite_differences", "finite_differences")]
)
def test_a_number_of_graphs_may_be_a_word(tmp_path: Path, given: str | int, made: str | int):
    """On the command line it is, in Python and YAML it need not be."""
    assert config(tmp_path, memory=given).algorithm_object().memory == made


def test_options_of_implicit_maml(tmp_path: Path):
    options = {"proximal": 2.0, "implicit_solver": "neumann", "implicit_iterations": 9, "memory": "finite_differences"}
    made = config(tmp_path, algorithm="imaml", **options).algorithm_object()
    assert made == ImplicitMAML(made.inner, "neumann", 9, "finite_differences")
    assert made.inner.proximal == 2.0


def test_the_schedule(tmp_path: Path):
    args = config(tmp_path, multitask_warmup_steps=2, multi_step_until=6, first_order_until=4)
    assert args.schedule() == Schedule(args.algorithm_object(), 2, 6, 4)


def test_the_memory_plan(tmp_path: Path):
    plan = config(tmp_path, memory_budget_gb=1.5, tasks_per_forward=3).memory_plan()
    assert (plan.budget, plan.tasks_per_forward) == (1_500_000_000, 3)
    found_out = config(tmp_path).memory_plan()
    assert (found_out.budget, found_out.tasks_per_forward) == (None, None)


def test_no_inner_steps_are_allowed_where_they_make_sense(tmp_path: Path):
    assert config(tmp_path, inner_steps=0).algorithm_object().second_order is False


def test_prompt_format(tmp_path: Path):
    args = config(tmp_path, prompt_template="Q: {input}", completion_template="A: {target}")
    assert args.prompt_format().render({"input": "a", "target": "b"}) == ("Q: a", "A: b")


def test_all_linear_is_one_word():
    assert ModelArguments(lora_target_modules=["all-linear"]).lora_target_modules == "all-linear"


@pytest.mark.parametrize("group", [ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments])
def test_every_option_of_ours_has_a_help_text(group: type):
    theirs = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(group):
        if theirs.get(field.name) is not field:
            assert field.metadata.get("help"), field.name


@pytest.mark.parametrize(
    ("options", "greater"),
    [
        ({"metric_for_best_model": "eval_wer"}, False),
        ({"metric_for_best_model": "chrf"}, True),
        ({"metric_for_best_model": "eval_loss"}, False),
        ({"metric_for_best_model": "loss_before"}, False),
        ({"metric_for_best_model": "eval_worst_loss"}, False),
        ({"metric_for_best_model": "wer", "greater_is_better": True}, True),
        ({}, None),
    ],
)
def test_the_best_checkpoint_is_the_one_with_the_better_metric(tmp_path: Path, options: dict, greater: bool | None):
    assert config(tmp_path, **options).greater_is_better is greater


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "maskd_lm"}, "objective must be one of causal_lm, .*got 'maskd_lm'. Did you mean 'masked_lm'?"),
        ({"num_labels": 1}, "num_labels must be a whole number from 2 to 10000; got 1"),
    ],
)
def test_kinds_of_models_that_are_refused(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        ModelArguments(**options)


@pytest.mark.parametrize("option", ["max_skipped_updates", "learning_rate", "first_order_until", "frozen_cache_gb"])
def test_nothing_is_no_number_where_one_is_needed(tmp_path: Path, option: str):
    with pytest.raises(MetaPeftError, match=f"{option} must be a number of . or more; got None"):
        MetaLoraConfig(str(tmp_path), **{option: None})


def test_a_process_has_its_tasks_whatever_devices_it_sees(tmp_path: Path):
    """transformers would give one that sees several GPUs a batch for each; here all its tasks go to the first."""
    args = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    args._n_gpu = 2
    assert args.train_batch_size == 8
    assert args.tasks_in_a_step == 8
