from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from surface import config
from transformers import TrainingArguments

from meta_peft import MAML, SGD, Adam, MetaLoraConfig, MetaPeftError, ModelArguments, MultiTask, Reptile, TaskArguments
from meta_peft.compare import CompareArguments

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
        ({"inner_lr": -1.0}, "inner_lr must be a finite number of 0 or more, got -1.0"),
        ({"inner_lr": math.inf}, "inner_lr must be a finite number of 0 or more, got inf"),
        ({"inner_lr": 0.0}, "inner_lr is 0: learned rates need a positive rate to start from"),
        (
            {"algorithm": "mamo"},
            "algorithm must be one of maml, fomaml, imaml, reptile, multitask; got 'mamo'. Did you mean 'maml'?",
        ),
        ({"algorithm": "x"}, "got 'x'.$"),
        ({"inner_optimizer": "adamw"}, "inner_optimizer must be one of sgd, adam; got 'adamw'. Did you mean 'adam'?"),
        (
            {"fp16": True},
            "fp16 is refused: gradient scaling does not reach the inner loop.*Use bf16, or plain precision",
        ),
        (
            {"remove_unused_columns": True},
            "remove_unused_columns would drop the support and query rows: leave it false",
        ),
        ({"max_steps": -1}, "max_steps must be 1 or more, got -1: episodes have no epochs"),
        ({"max_steps": 0}, "max_steps must be 1 or more, got 0"),
        ({"fsdp": "full_shard"}, "fsdp and deepspeed are refused: sharded weights have no second derivative here yet"),
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
        ({"lora_r": 0}, "lora_r must be a number of 1 or more; got 0"),
    ],
)
def test_model_options(options: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        ModelArguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "all"}, "compare must be none, plain or full; got 'all'"),
        ({"adaptation_steps": []}, r"adaptation_steps must be numbers of 0 or more; got \[\]"),
        ({"adaptation_steps": [0, -1]}, r"adaptation_steps must be numbers of 0 or more; got \[0, -1\]"),
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


@pytest.mark.parametrize(
    ("name", "kind", "second_order", "learned"),
    [
        ("maml", MAML, True, True),
        ("fomaml", MAML, False, True),
        ("reptile", Reptile, False, False),
        ("multitask", MultiTask, False, False),
    ],
)
def test_algorithms(tmp_path: Path, name: str, kind: type, second_order: bool, learned: bool):
    args = config(tmp_path, algorithm=name)
    algorithm = args.algorithm_object()
    assert type(algorithm) is kind
    assert algorithm.second_order is second_order
    assert algorithm.inner == args.inner_rule()
    assert algorithm.inner.learn_rates is learned


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
