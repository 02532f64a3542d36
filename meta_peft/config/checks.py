"""Which options of `MetaLoraConfig` are refused: values out of range, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from meta_peft.algorithms.implicit import SOLVERS
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.metrics import metric_named
from meta_peft.evaluation.scoring import CHOICE_SCORES
from meta_peft.tasks.sampling import ADAPTIVE, check_sampling
from meta_peft.tasks.support_selection import NEED_THE_BASE, check_selection
from meta_peft.utils.checked import at_least, is_number, one_of, shown

ALGORITHMS = ("maml", "fomaml", "imaml", "reptile", "multitask")
INNER_OPTIMIZERS = ("sgd", "adam")
POSITIVE = (
    *("max_skipped_updates", "gradient_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
POSITIVE_OR_NONE = (
    *("shots", "query_size", "eval_query_size", "implicit_iterations", "tasks_per_forward", "tasks_per_step"),
    *("max_new_tokens", "dataset_num_proc", "curriculum_steps", "dataloader_prefetch_factor"),
)
NOT_NEGATIVE = (
    *("inner_lr_learning_rate", "multitask_warmup_steps", "inner_adam_eps_root", "inner_momentum", "proximal"),
    *("inner_weight_decay", "first_order_until", "multi_step_until", "learning_rate", "weight_decay", "max_grad_norm"),
    *("frozen_cache_gb", "seed", "dataloader_num_workers", "adam_epsilon"),
)
OF_A_BACKWARD_PASS = ("galore", "apollo", "lomo", "adalomo")  # how optimizers are called that are given the model
NOT_LOOKED_FOR = ("flyte", "kubeflow")  # trackers of platforms, of which transformers knows only there


def check_values(options: Any) -> None:
    """Each option by itself.

    Raises:
        MetaPeftError: a value is none of the names that there are, or out of range.
    """
    one_of("algorithm", options.algorithm, ALGORITHMS)
    one_of("inner_optimizer", options.inner_optimizer, INNER_OPTIMIZERS)
    one_of("implicit_solver", options.implicit_solver, SOLVERS)
    one_of("choice_score", options.choice_score, CHOICE_SCORES)
    one_of("task_leakage", options.task_leakage, ("warn", "error", "ignore"))
    if options.metric is not None:
        metric_named(options.metric)
    at_least("inner_steps", options.inner_steps, 1 if options.algorithm in ("reptile", "imaml") else 0)
    at_least("max_length", options.max_length, 4)
    for name in POSITIVE:
        at_least(name, getattr(options, name), 1)
    for name in POSITIVE_OR_NONE:
        if getattr(options, name) is not None:
            at_least(name, getattr(options, name), 1)
    for name in NOT_NEGATIVE:
        at_least(name, getattr(options, name), 0)
    for name in ("adam_beta1", "adam_beta2"):
        if not (is_number(value := getattr(options, name)) and 0 <= value < 1):
            raise MetaPeftError(f"{name} must be a number of 0 or more and below 1; got {shown(value)}.")
    if options.second_order_steps is not None:
        at_least("second_order_steps", options.second_order_steps, 0)
    if options.memory_budget_gb is not None and not options.memory_budget_gb > 0:
        raise MetaPeftError(f"memory_budget_gb must be positive; got {options.memory_budget_gb!r}.")
    if options.max_steps <= 0:
        raise MetaPeftError(f"max_steps must be 1 or more, got {options.max_steps}: episodes have no epochs.")
    check_sampling(options.task_sampling, options.sampling_temperature, options.sampling_exploration)
    check_selection(options.support_selection)


def check_together(options: Any) -> None:
    """What meta-learning rules out, alone or together with something else.

    Raises:
        MetaPeftError: options that would be silently wrong.
    """
    for refused, why in (*_of_the_trainer(options), *_of_pairs(options)):
        if refused:
            raise MetaPeftError(why)


def check_trackers(names: Sequence[str]) -> None:
    """Raise `MetaPeftError` for a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        one_of("report_to", name, [*sorted(INTEGRATION_TO_CALLBACK), "all", "none"])
        if name not in (*get_available_reporting_integrations(), *NOT_LOOKED_FOR):
            raise MetaPeftError(f"report_to names {name}, which is not installed: install it, or set report_to: none.")


def _of_the_trainer(options: Any) -> Iterator[tuple[Any, str]]:
    """Options of `transformers.TrainingArguments`."""
    yield (
        options.fp16,
        "fp16 is refused: gradient scaling does not reach the inner loop, so small gradients would be lost."
        " Load the base in bfloat16 (dtype), or in plain precision.",
    )
    yield (
        options.bf16,
        "bf16 is refused: it would change nothing, since what is computed in is the base's own type. Load the base in"
        " bfloat16 (dtype: bfloat16).",
    )
    yield (
        options.bf16_full_eval or options.fp16_full_eval,
        "bf16_full_eval and fp16_full_eval are refused: they would change nothing, since tasks are evaluated in the base's"
        " own type. Leave them out.",
    )
    yield (
        options.data_seed not in (None, options.seed),
        f"data_seed={options.data_seed} is refused: it would change nothing, since episodes are drawn from seed"
        f" ({options.seed}). Set seed, or leave data_seed out.",
    )
    yield (
        getattr(options, "train_sampling_strategy", "random") != "random",  # which the first of transformers 5 has not
        "train_sampling_strategy is refused: it would change nothing, since task_sampling says which tasks are drawn. Leave"
        " it out.",
    )
    yield (
        options.include_num_input_tokens_seen not in ("no", False),
        "include_num_input_tokens_seen is refused: what is read at once are episodes, which go through the model several"
        " times. Leave it out.",
    )
    yield (
        options.use_liger_kernel,
        "use_liger_kernel is refused: Liger's kernels have no second derivative. Leave it out.",
    )
    yield (
        options.num_train_epochs != 3.0,  # the default of TrainingArguments
        "num_train_epochs is refused: episodes are drawn anew and have no epochs. Set max_steps.",
    )
    yield (
        options.label_smoothing_factor or options.neftune_noise_alpha,
        "label_smoothing_factor and neftune_noise_alpha are refused: the inner loop would not have them. Leave them out.",
    )
    yield (
        options.remove_unused_columns,
        "remove_unused_columns would drop the support and query rows: leave it false.",
    )
    yield (
        options.fsdp or options.deepspeed,
        "The options fsdp and deepspeed are refused: they would wrap the whole model, LoRA included. Leave both out"
        " and start with accelerate launch --config_file recipes/accelerate/fsdp2.yaml, or deepspeed_zero3.yaml"
        " beside it, which shard the frozen base alone; or with a base that is whole in every process"
        " (docs/scaling.md).",
    )
    optim = str(getattr(options.optim, "value", options.optim))
    yield (
        optim.startswith(OF_A_BACKWARD_PASS),
        f"optim={optim} is refused: it follows a backward pass through the layers of the model, and a meta-gradient comes"
        " from none. Choose another one, such as adamw_torch.",
    )
    yield (
        options.torch_compile,
        "torch_compile is refused: compiled code has no second derivative. Leave it off.",
    )


def _of_pairs(options: Any) -> Iterator[tuple[Any, str]]:
    """Options that exclude each other."""
    sampling, selection, workers = options.task_sampling, options.support_selection, options.dataloader_num_workers
    yield (
        options.frozen_cache_gb and options.deterministic_reduction,
        "frozen_cache_gb with deterministic_reduction is refused: the last bits of what is kept depend on which"
        " rows met first. Leave one of them out.",
    )
    yield (
        workers and sampling in ADAPTIVE,
        f"task_sampling={sampling} with dataloader_num_workers={workers} is refused:"
        " workers read ahead, before the steps that the choice depends on. Set dataloader_num_workers=0.",
    )
    yield (
        workers and selection in NEED_THE_BASE,
        f"support_selection={selection} with dataloader_num_workers is refused: workers have no"
        " model to ask. Set dataloader_num_workers=0.",
    )
    yield (
        sampling.startswith("by_gradient") and not options.deterministic_reduction,
        f"task_sampling={sampling} needs the gradient of each task, and tasks that are computed together"
        " give one for all: set deterministic_reduction=True, which computes each alone.",
    )
    yield (
        options.learn_head is False and not options.adapts_throughout,
        "learn_head=False is for algorithms that adapt the head in every step: with algorithm='multitask' or"
        " multitask_warmup_steps it would stay as it is. Leave it out.",
    )
