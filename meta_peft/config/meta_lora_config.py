"""The options of meta-training: `transformers.TrainingArguments` and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile
from meta_peft.config.checks import check_together, check_trackers, check_values
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.metrics import LOSSES, METRICS
from meta_peft.inner_loop.inner_path import check_memory
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.outer_loop.memory_plan import MemoryPlan
from meta_peft.outer_loop.schedule import AnyAlgorithm, Schedule
from meta_peft.processes import check_launch, join
from meta_peft.sharding import LockstepPlan, asked_for
from meta_peft.tasks.labelling import LABEL_WORDS, Labelling
from meta_peft.tasks.prompt import PromptFormat
from meta_peft.tasks.sampling import TaskSampling, task_sampling
from meta_peft.utils.checked import one_of


@dataclass
class MetaLoraConfig(TrainingArguments):
    """`transformers.TrainingArguments` for meta-training: a step is one outer update, a batch is one of tasks."""

    output_dir: str | None = field(default="outputs/meta_lora", metadata={"help": "Where checkpoints and results go."})
    algorithm: str = field(
        default="maml",
        metadata={"help": "maml (second order), fomaml (first order), imaml (implicit), reptile or multitask."},
    )
    shots: int = field(default=4, metadata={"help": "Support rows of a task, which the inner loop adapts on."})
    query_size: int = field(
        default=4,
        metadata={
            "help": "Query rows of a task, others than its support rows: the loss on them after the inner steps is"
            " what the outer loop lowers."
        },
    )
    inner_steps: int = field(default=3, metadata={"help": "Gradient steps of the inner loop."})
    inner_optimizer: str = field(default="adam", metadata={"help": "Update rule of the inner loop: sgd or adam."})
    inner_lr: float = field(
        default=2e-3,
        metadata={"help": "Learning rate of the inner loop; where rates are learned, what all of them begin at."},
    )
    inner_momentum: float = field(default=0.0, metadata={"help": "Momentum of the inner sgd."})
    inner_adam_eps_root: float = field(
        default=1e-8, metadata={"help": "Added to the second moment of the inner adam, inside the root."}
    )
    inner_weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay of the inner adam."})
    inner_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip each task's inner gradient to this norm; none by default."}
    )
    fast_weights: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for the names of the weights that the inner loop adapts, such as lora_B, or the"
            " head's name for a head alone; the outer loop alone learns the others. All by default."
        },
    )
    learn_head: bool | None = field(
        default=None,
        metadata={
            "help": "Learn the start of a classification head's last layer; if false, it stays as it was made. By"
            " default it is learned, unless the inner loop adapts it and label_words are permuted: classes change"
            " places then, and a start that prefers one is wrong for most episodes."
        },
    )
    learn_inner_lr: bool = field(
        default=True,
        metadata={
            "help": "Learn the inner learning rates in the outer loop, one for each LoRA matrix; if false, all stay at"
            " inner_lr."
        },
    )
    inner_lr_per_step: bool = field(default=False, metadata={"help": "Learn rates for each inner step separately."})
    inner_lr_per_entry: bool = field(default=False, metadata={"help": "Learn a rate for each entry of a LoRA matrix."})
    inner_lr_learning_rate: float = field(
        default=0.05, metadata={"help": "Outer learning rate of the log inner rates."}
    )
    second_order_steps: int | None = field(
        default=None,
        metadata={"help": "Differentiate the inner gradients of this many last steps only; all by default."},
    )
    first_order_until: int = field(
        default=0, metadata={"help": "Outer step before which maml is first-order (MAML++)."}
    )
    multi_step_until: int = field(
        default=0,
        metadata={
            "help": "Outer step until which query losses after earlier inner steps count too, less and less (MAML++)."
        },
    )
    proximal: float = field(
        default=0.0, metadata={"help": "Pull of the inner loop towards its start; imaml needs it (its lambda)."}
    )
    implicit_solver: str = field(default="cg", metadata={"help": "How imaml solves its linear system: cg or neumann."})
    implicit_iterations: int = field(default=5, metadata={"help": "Iterations of that solver."})
    memory: str = field(
        default="auto",
        metadata={
            "help": "What is kept of the inner steps' graphs: unrolled (all), replay (none, each is built again), a number"
            " (those of the last steps), finite_differences (no second derivatives), or auto (what fits)."
        },
    )
    memory_budget_gb: float | None = field(
        default=None, metadata={"help": "Memory for auto to plan with; by default a share of what the device has left."}
    )
    frozen_cache_gb: float = field(
        default=0.0,
        metadata={
            "help": "With LoRA on upper layers: keep what the layers below return for each row, up to so much memory, so"
            " that a row goes through them once in a run. Results are the same to rounding."
        },
    )
    multitask_warmup_steps: int = field(
        default=0, metadata={"help": "Outer steps of multi-task training before the algorithm proper."}
    )
    tasks_per_forward: int | None = field(
        default=None, metadata={"help": "Tasks that go through the model at once; by default as many as fit."}
    )
    tasks_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Tasks per outer step of all processes together, so that the update does not depend on their number;"
            " by default per_device_train_batch_size for each process and accumulated batch."
        },
    )
    deterministic_reduction: bool = field(
        default=False,
        metadata={
            "help": "Compute each task alone and add gradients up in the order of the tasks: the same bits for any number"
            " of processes. Slower."
        },
    )
    max_skipped_updates: int = field(
        default=5,
        metadata={
            "help": "Training stops, with a checkpoint, after this many outer steps in a row whose gradient was not finite."
            " Such a step changes nothing."
        },
    )
    task_column: list[str] = field(
        default_factory=lambda: ["task"],
        metadata={"help": "The column that names the task of a row; several columns name it together."},
    )
    ways: int | None = field(
        default=None,
        metadata={
            "help": "Classes of an episode, which then has shots and query_size rows of each. They are classes of one task;"
            " or of all data, where task_column is label_column. By default rows are drawn whatever their label."
        },
    )
    label_words: str = field(
        default="given",
        metadata={
            "help": "With ways, what the classes of an episode are called: given (as in the data), permuted (the same"
            " words, shuffled among the classes in each episode) or letters (A, B, C, at random). Under a head classes"
            " are numbers: if given, the same that they have without ways and when you adapt, else at random."
        },
    )
    label_column: str = field(default="label", metadata={"help": "With ways, the column of labels."})
    task_sampling: str = field(
        default="uniform",
        metadata={
            "help": "Which tasks an outer step has: uniform (each once a round), by_size, by_difficulty (recent query"
            " loss), by_gradient_diversity, by_gradient_similarity or curriculum (from easy to hard)."
        },
    )
    sampling_temperature: float = field(
        default=2.0, metadata={"help": "by_size draws tasks in proportion to their rows to the power of 1 / this."}
    )
    sampling_exploration: float = field(
        default=0.2,
        metadata={"help": "Share of the chances that by_difficulty and by_gradient spread evenly over all tasks."},
    )
    curriculum_steps: int | None = field(
        default=None,
        metadata={"help": "Outer steps until a curriculum has all tasks; by default half of max_steps."},
    )
    support_selection: str = field(
        default="random",
        metadata={
            "help": "Which rows of a task are support, in training and evaluation: random, balanced (over the answers),"
            " diverse (k-center in the base's representation) or uncertain (the base's highest loss)."
        },
    )
    task_leakage: str = field(
        default="warn",
        metadata={"help": "What near-duplicate tasks in different splits are: warn (in the log), error or ignore."},
    )
    prompt_template: str = field(
        default="{input} ->", metadata={"help": "Prompt made of an input (or text, question)."}
    )
    completion_template: str = field(
        default=" {target}", metadata={"help": "Completion made of a target (or label, answer)."}
    )
    context_template: str = field(
        default="{context}\n{question}", metadata={"help": "Input made of a question that comes with a context."}
    )
    assistant_turns: str = field(
        default="last", metadata={"help": "Turns of the assistant that a conversation teaches: last or all."}
    )
    max_length: int = field(default=256, metadata={"help": "Longest row in tokens; longer prompts lose their start."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; this one alone by default."}
    )
    eval_query_size: int = field(default=8, metadata={"help": "Query rows of a task in evaluation."})
    metric: str | None = field(
        default=None,
        metadata={
            "help": "What evaluation reports beside the loss: exact_match, accuracy, macro_f1, token_f1, squad_exact_match,"
            " squad_f1, chrf, bleu, wer, cer or ece. By default exact_match for text, wer for speech, accuracy for"
            " classification heads."
        },
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Where a generated answer is cut in evaluation; by default 16 tokens beyond the longest reference."
        },
    )
    choice_score: str = field(
        default="sum",
        metadata={"help": "Answers to choose from are ranked by the sum or the mean of their tokens' log-likelihoods."},
    )

    # What is new here for options that TrainingArguments has already.
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Tasks per outer step and process."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Tasks that are evaluated at once."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Outer learning rate of the LoRA initialisation."})
    max_steps: int = field(default=100, metadata={"help": "Outer steps."})
    logging_steps: float = field(default=5, metadata={"help": "Outer steps between two lines of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always false: episodes have no columns."})

    def __post_init__(self) -> None:
        check_values(self)
        inherited: Any = self
        best = (inherited.metric_for_best_model or "").removeprefix("eval_")
        if inherited.greater_is_better is None:  # else more would be better of all whose name does not end in loss
            if best in METRICS:
                inherited.greater_is_better = METRICS[best].higher_is_better
            elif best in LOSSES:
                inherited.greater_is_better = False
        check_memory(self._memory())
        asked_for()  # before TrainingArguments reads what the launcher set
        self.algorithm_object()
        check_together(self)
        self.prompt_format()
        self.labelling()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is no memory to pin, and torch would warn
        join(self.ddp_timeout)
        super().__post_init__()
        check_trackers(inherited.report_to)
        check_launch(self.world_size)

    @property
    def tasks_in_a_step(self) -> int:
        """Tasks per outer step of all processes together."""
        # Not train_batch_size, which is that of all devices that a process sees: here one has all its tasks.
        per_process = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.tasks_per_step or per_process * self.world_size

    @property
    def held_out_seed(self) -> int:
        """Of the episodes of held-out tasks, which are none of the training's."""
        return int(self.seed) + 1

    def sampling(self, sizes: Sequence[int]) -> TaskSampling:
        """Which task an episode is of, for tasks of so many rows each."""
        return task_sampling(
            self.task_sampling,
            sizes,
            seed=self.seed,
            tasks_per_step=self.tasks_in_a_step,
            temperature=self.sampling_temperature,
            exploration=self.sampling_exploration,
            curriculum_steps=self.curriculum_steps or max(1, self.max_steps // 2),
        )

    @property
    def learns_head(self) -> bool:
        """`learn_head`, or what it is by default as far as these options tell."""
        if self.learn_head is not None:
            return self.learn_head
        return self.label_words != "permuted" or not self.adapts_throughout

    @property
    def adapts_throughout(self) -> bool:
        """Whether every outer step has an inner loop."""
        return self.algorithm_object().adapts and not self.multitask_warmup_steps

    def prompt_format(self) -> PromptFormat:
        """How rows become text."""
        return PromptFormat(self.prompt_template, self.completion_template, self.context_template, self.assistant_turns)

    @property
    def task_columns(self) -> tuple[str, ...]:
        """All of `task_column`, which in Python may be one text."""
        columns: Any = self.task_column
        return (columns,) if isinstance(columns, str) else tuple(columns)

    def labelling(self) -> Labelling | None:
        """How the classes of an episode are drawn, if episodes are of classes."""
        if self.ways is not None:
            return Labelling(self.ways, self.label_words, self.label_column)
        one_of("label_words", self.label_words, LABEL_WORDS)
        if self.label_words != "given":
            raise MetaPeftError(f"label_words: {self.label_words} is of episodes of classes: say of how many (ways).")
        return None

    def inner_rule(self) -> InnerRule:
        """The inner rule that these options describe."""
        adam = Adam(eps_root=self.inner_adam_eps_root, weight_decay=self.inner_weight_decay)
        learned = self.algorithm in ("maml", "fomaml") and self.learn_inner_lr
        return InnerRule(
            optimizer=adam if self.inner_optimizer == "adam" else SGD(self.inner_momentum),
            lr=self.inner_lr,
            steps=self.inner_steps,
            learn_rates=learned,
            rates_per_step=learned and self.inner_lr_per_step,
            rates_per_entry=learned and self.inner_lr_per_entry,
            clip=self.inner_max_grad_norm,
            proximal=self.proximal,
            fast=self.fast_weights,
        )

    def algorithm_object(self) -> AnyAlgorithm:
        """The algorithm that these options describe."""
        rule, memory = self.inner_rule(), self._memory()
        kinds: dict[str, Any] = {
            "maml": lambda: MAML(rule, second_order_steps=self.second_order_steps, memory=memory),
            "fomaml": lambda: MAML(rule, first_order=True),
            "imaml": lambda: ImplicitMAML(rule, self.implicit_solver, self.implicit_iterations, memory),
            "reptile": lambda: Reptile(rule),
            "multitask": lambda: MultiTask(rule),
        }
        made: AnyAlgorithm = kinds[self.algorithm]()
        return made

    def _memory(self) -> str | int:
        """A number, which the command line gives as a word, as a number."""
        number = str(self.memory).removeprefix("-").isdecimal()
        return int(self.memory) if number else self.memory

    def schedule(self) -> Schedule:
        """Which algorithm runs at which outer step."""
        return Schedule(
            self.algorithm_object(), self.multitask_warmup_steps, self.multi_step_until, self.first_order_until
        )

    def memory_plan(self) -> MemoryPlan:
        """How batches are split to fit into memory, or to keep processes in step where the base is sharded."""
        if asked_for():
            return LockstepPlan(self.tasks_per_forward)
        budget = None if self.memory_budget_gb is None else int(self.memory_budget_gb * 1e9)
        return MemoryPlan(self.tasks_per_forward, budget)
