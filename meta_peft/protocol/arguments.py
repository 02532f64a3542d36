"""What is compared, beside the options of the training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_peft.errors import MetaPeftError
from meta_peft.objectives import CLASSIFYING
from meta_peft.utils.checked import at_least, one_of

META, DEFAULTS, IN_CONTEXT = "meta", "peft_defaults", "in_context"
PLAIN, MULTITASK, CLASSIFIER, TASK_HEADS = "plain", "multitask", "classifier", "task_heads"
REPTILE, IMPLICIT = "reptile", "imaml"
TITLES = {
    DEFAULTS: "PEFT's defaults",
    PLAIN: "plain LoRA",
    MULTITASK: "multi-task LoRA",
    CLASSIFIER: "one classifier, new head",
    TASK_HEADS: "a head for each task, new head",
    REPTILE: "Reptile",
    "fomaml": "first-order MAML",
    IMPLICIT: "implicit MAML",
    META: "meta-learned LoRA",
    IN_CONTEXT: "in-context examples",
}
"""Starts by name, as tables call them. ``meta`` is what the run's own options say."""
NEW_HEAD = (CLASSIFIER, TASK_HEADS)  # what these are trained with is thrown away
WITHOUT_INNER_LOOP = (MULTITASK, *NEW_HEAD)
UNTRAINED = (DEFAULTS, PLAIN, IN_CONTEXT)


@dataclass
class ProtocolArguments:
    """Which starts are compared, over which seeds, and along what."""

    starts: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Starts to compare: {', '.join(TITLES)}. meta is what the other options say. By default all that there"
            " are for the objective."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Seeds of training and of the held-out episodes; each start is trained once for each."},
    )
    shots_curve: list[int] | None = field(
        default=None, metadata={"help": "Also compare with these numbers of support rows."}
    )
    task_counts: list[int] | None = field(
        default=None,
        metadata={
            "help": "Also train on so many of the training tasks, fewer than all; each is a training of its own."
        },
    )
    measure: bool = field(
        default=True, metadata={"help": "Measure what is missing. If false, only write the report of what is there."}
    )

    def __post_init__(self) -> None:
        for start in self.starts or ():
            one_of("starts", start, TITLES)
        if self.starts == []:
            raise MetaPeftError("starts must name at least one, or be left out for all that there are; got none.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise MetaPeftError(f"seeds must be one or more different numbers; got {self.seeds}.")
        for option in ("seeds", "shots_curve", "task_counts"):
            for value in getattr(self, option) or ():
                at_least(option, value, 0 if option == "seeds" else 1)

    def check_task_counts(self, tasks: int, least: int = 1) -> None:
        """Raise if one of `task_counts` is not below the number of training tasks: that training would be done twice.

        Args:
            tasks: the number of training tasks.
            least: of how many tasks an episode is, where tasks are classes.
        """
        if too_few := [count for count in self.task_counts or () if count < least]:
            raise MetaPeftError(
                f"task_counts must be {least} or more, since tasks are classes here and an episode takes ways={least} of"
                f" them; got {', '.join(map(str, too_few))}. Leave these out."
            )
        too_many = [count for count in self.task_counts or () if count >= tasks]
        if too_many:
            raise MetaPeftError(
                f"task_counts must be below the number of training tasks, {tasks}, on all of which each start is trained"
                f" anyway; got {', '.join(map(str, too_many))}. Lower or leave out what is not below."
            )

    def starts_of(self, objective: str, label_words: str, *, tasks_are_classes: bool) -> list[str]:
        """The starts that are asked for, or all that an objective and what classes are called allow.

        Args:
            tasks_are_classes: whether the task column is that of the labels.

        Raises:
            MetaPeftError: one is asked for that cannot be.
        """
        cannot = {}
        if objective != "causal_lm":
            cannot[IN_CONTEXT] = f"in-context examples need a causal language model, and this one is for {objective}"
        if objective not in CLASSIFYING or label_words == "given":
            cannot[CLASSIFIER] = (
                "a classifier whose head is replaced needs a classification head and label_words: permuted or letters; with"
                " given labels, multitask is one classifier for all tasks"
            )
        if objective != "sequence_classification" or tasks_are_classes:
            cannot[TASK_HEADS] = (
                "a head for each training task needs a model with a head for whole rows, and tasks of several classes each"
            )
        for start in self.starts or ():
            if start in cannot:
                raise MetaPeftError(f"starts: {start} cannot be compared here: {cannot[start]}. Leave it out.")
        return self.starts or [start for start in TITLES if start not in cannot]
