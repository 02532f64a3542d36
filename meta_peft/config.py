"""Every option of a run, in three flat groups with the ecosystem's names: the model, the tasks, the training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from meta_peft.algorithms import MAML, MultiTask, Reptile
from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.tasks.prompt import PromptFormat

ALGORITHMS = ("maml", "fomaml", "reptile", "multitask")
INNER_OPTIMIZERS = ("sgd", "adam")


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise MetaPeftError(
            f"{option} must be one of {', '.join(choices)}; got {value!r}.{did_you_mean(value, choices)}"
        )


def _at_least(option: str, value: float, least: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= least):
        raise MetaPeftError(f"{option} must be a number of {least} or more; got {value!r}.")


@dataclass
class ModelArguments:
    """The base model, its precision and where LoRA goes."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Base model: a hub id or a local folder."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the base model."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the base: float32 or bfloat16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bits with bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to 8 bits with bitsandbytes."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit data type: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales too."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base, such as sdpa or eager; transformers' choice by default."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale: updates are multiplied by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Kept in the adapter's config; the inner loop uses none."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj", "o_proj", "down_proj"],
        metadata={"help": "Names of the linear layers that get LoRA."},
    )
    lora_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of the decoder layers that get LoRA; all by default. Layers below run only once."},
    )

    def __post_init__(self) -> None:
        _choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4"))
        if self.dtype == "float16":
            raise MetaPeftError(
                "dtype=float16 is refused: gradient scaling does not reach the inner loop, so small gradients would be"
                " lost. Use bfloat16 or float32."
            )
        _choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.load_in_4bit and self.load_in_8bit:
            raise MetaPeftError("load_in_4bit and load_in_8bit are both set: choose one.")
        _at_least("lora_r", self.lora_r, 1)
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"  # type: ignore[assignment]  # what PEFT understands


@dataclass
class TaskArguments:
    """Where the tasks come from."""

    train_tasks: str = field(
        default="locale_formatting",
        metadata={"help": "Training tasks: a JSONL file with a task column, or locale_formatting (the demo)."},
    )
    validation_tasks: str | None = field(
        default=None, metadata={"help": "JSONL of validation tasks, on which adaptation rates are tuned."}
    )
    test_tasks: str | None = field(default=None, metadata={"help": "JSONL of held-out tasks for the final table."})


@dataclass
class MetaLoraConfig(TrainingArguments):
    """`transformers.TrainingArguments` for meta-training: a step is one outer update, a batch is one of tasks."""

    output_dir: str | None = field(default="outputs/meta_lora", metadata={"help": "Where checkpoints and results go."})
    algorithm: str = field(
        default="maml", metadata={"help": "maml (second order), fomaml (first order), reptile or multitask."}
    )
    shots: int = field(default=4, metadata={"help": "Support rows of a task, which the inner loop adapts on."})
    query_size: int = field(default=4, metadata={"help": "Other rows of the task, which the adapted weights face."})
    inner_steps: int = field(default=3, metadata={"help": "Gradient steps of the inner loop."})
    inner_optimizer: str = field(default="adam", metadata={"help": "Update rule of the inner loop: sgd or adam."})
    inner_lr: float = field(
        default=2e-3, metadata={"help": "Learning rate of the inner loop, where learned rates start."}
    )
    inner_momentum: float = field(default=0.0, metadata={"help": "Momentum of the inner sgd."})
    inner_adam_eps_root: float = field(
        default=1e-8, metadata={"help": "Added to the second moment of the inner adam, inside the root."}
    )
    learn_inner_lr: bool = field(default=True, metadata={"help": "Learn one inner rate for each LoRA matrix."})
    inner_lr_per_step: bool = field(default=False, metadata={"help": "Learn rates for each inner step separately."})
    inner_lr_learning_rate: float = field(
        default=0.05, metadata={"help": "Outer learning rate of the log inner rates."}
    )
    multitask_warmup_steps: int = field(
        default=0, metadata={"help": "Outer steps of multi-task training before the algorithm proper."}
    )
    tasks_per_forward: int | None = field(
        default=None, metadata={"help": "Tasks that go through the model at once; fewer need less memory."}
    )
    task_column: str = field(default="task", metadata={"help": "The column that names the task of a row."})
    prompt_template: str = field(
        default="{input} ->", metadata={"help": "Prompt made of an input (or text, question)."}
    )
    completion_template: str = field(
        default=" {target}", metadata={"help": "Completion made of a target (or label, answer)."}
    )
    max_length: int = field(default=256, metadata={"help": "Longest row in tokens; longer prompts lose their start."})
    eval_query_size: int = field(default=8, metadata={"help": "Query rows of a task in evaluation."})

    # What is new here for options that TrainingArguments has already.
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Tasks per outer step and process."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Tasks that are evaluated at once."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Outer learning rate of the LoRA initialisation."})
    max_steps: int = field(default=100, metadata={"help": "Outer steps."})
    logging_steps: float = field(default=5, metadata={"help": "Outer steps between two lines of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always false: episodes have no columns."})

    def __post_init__(self) -> None:
        _choice("algorithm", self.algorithm, ALGORITHMS)
        _choice("inner_optimizer", self.inner_optimizer, INNER_OPTIMIZERS)
        _at_least("inner_steps", self.inner_steps, 1 if self.algorithm == "reptile" else 0)
        for option, least in (("shots", 1), ("query_size", 1), ("eval_query_size", 1), ("max_length", 4)):
            _at_least(option, getattr(self, option), least)
        for option in ("inner_lr_learning_rate", "multitask_warmup_steps", "inner_adam_eps_root", "inner_momentum"):
            _at_least(option, getattr(self, option), 0)
        if self.tasks_per_forward is not None:
            _at_least("tasks_per_forward", self.tasks_per_forward, 1)
        if self.fp16:
            raise MetaPeftError(
                "fp16 is refused: gradient scaling does not reach the inner loop, so small gradients would be lost."
                " Use bf16, or plain precision."
            )
        if self.remove_unused_columns:
            raise MetaPeftError("remove_unused_columns would drop the support and query rows: leave it false.")
        if self.max_steps <= 0:
            raise MetaPeftError(f"max_steps must be 1 or more, got {self.max_steps}: episodes have no epochs.")
        if self.fsdp or self.deepspeed:
            raise MetaPeftError(
                "fsdp and deepspeed are refused: sharded weights have no second derivative here yet. Several processes"
                " with a replicated base work: leave both out."
            )
        if self.torch_compile:
            raise MetaPeftError("torch_compile is refused: compiled code has no second derivative. Leave it off.")
        self.algorithm_object()
        self.prompt_format()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is no memory to pin, and torch would warn
        super().__post_init__()

    def prompt_format(self) -> PromptFormat:
        """How rows become text."""
        return PromptFormat(self.prompt_template, self.completion_template)

    def inner_rule(self) -> InnerRule:
        """The inner rule that these options describe."""
        adam = Adam(eps_root=self.inner_adam_eps_root)
        learned = self.algorithm in ("maml", "fomaml") and self.learn_inner_lr
        return InnerRule(
            optimizer=adam if self.inner_optimizer == "adam" else SGD(self.inner_momentum),
            lr=self.inner_lr,
            steps=self.inner_steps,
            learn_rates=learned,
            rates_per_step=learned and self.inner_lr_per_step,
        )

    def algorithm_object(self) -> MAML | Reptile | MultiTask:
        """The algorithm that these options describe."""
        rule = self.inner_rule()
        kinds: dict[str, Any] = {
            "maml": lambda: MAML(rule),
            "fomaml": lambda: MAML(rule, first_order=True),
            "reptile": lambda: Reptile(rule),
            "multitask": lambda: MultiTask(rule),
        }
        made: MAML | Reptile | MultiTask = kinds[self.algorithm]()
        return made
