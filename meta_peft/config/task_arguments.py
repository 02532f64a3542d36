"""The options that say where tasks come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.row_index import LEFT_OUT_OR_NOT
from meta_peft.tasks.self_supervised import KINDS as SELF_SUPERVISED
from meta_peft.utils.checked import at_least, is_number, one_of


@dataclass
class TaskArguments:
    """Where the tasks come from."""

    train_tasks: list[str] = field(
        default_factory=lambda: ["locale_formatting"],
        metadata={
            "help": "Training tasks: a file (JSONL, JSON, CSV, TSV, text, Parquet) with a task column; a folder or several"
            " files, one for each task; or locale_formatting (the demo)."
        },
    )
    validation_tasks: list[str] | None = field(
        default=None, metadata={"help": "Validation tasks, on which adaptation rates are tuned: files as above."}
    )
    test_tasks: list[str] | None = field(
        default=None, metadata={"help": "Held-out tasks for the final table: files as above."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "In place of the three above, a dataset that holds all splits: a hub id, a folder that save_to_disk"
            " wrote, or a folder with files or folders named train, validation and test."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "The hub's name for one of several datasets under one id."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "What dataset_name calls its training split."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "What it calls its validation split; validation, if there is one, by default."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "What it calls its test split; test, if there is one, by default."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the hub's rows one after the other, not whole files first."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "With streaming, only so many first rows."})
    rename_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns to rename, such as sentence=text sentiment=label."}
    )
    split_fractions: list[float] | None = field(
        default=None,
        metadata={
            "help": "Split the training tasks (or the classes, where the label is the task column) into training,"
            " validation and test tasks, such as 0.8 0.1 0.1."
        },
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of that split: another one puts other tasks into each part."}
    )
    source_lang: str | None = field(
        default=None, metadata={"help": "Of translation rows, only those from this language; each by default."}
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "Of translation rows, only those into this language; each by default."}
    )
    self_supervised: str | None = field(
        default=None,
        metadata={
            "help": "Make tasks of plain text: smlmt (which word was masked?), span (write what was taken out) or"
            " continuation (write how a sentence goes on)."
        },
    )
    mask_word: str = field(default="___", metadata={"help": "What stands for words that self_supervised takes out."})
    empty_rows: str = field(
        default="error",
        metadata={"help": "Rows without input, answer or task: error, or leave_out, which leaves them out and counts."},
    )
    small_tasks: str = field(
        default="error",
        metadata={"help": "Tasks with too few rows or classes for an episode: error, or leave_out, which counts them."},
    )

    def __post_init__(self) -> None:
        for option in ("train_tasks", "validation_tasks", "test_tasks"):
            given = getattr(self, option)
            if isinstance(given, list) and len(given) == 1:
                setattr(self, option, given[0])  # one path is a path, as it is written in Python
        for option in ("empty_rows", "small_tasks"):
            one_of(option, getattr(self, option), LEFT_OUT_OR_NOT)
        if self.self_supervised is not None:
            one_of("self_supervised", self.self_supervised, SELF_SUPERVISED)
            if self.source_lang or self.target_lang:
                raise MetaPeftError("self_supervised and languages are both set: tasks come from one of them.")
        if not self.mask_word:
            raise MetaPeftError("mask_word is empty: what is taken out must leave a mark.")
        if self.dataset_name is not None:
            if (
                self.train_tasks not in ("locale_formatting", ["locale_formatting"])
                or self.validation_tasks
                or self.test_tasks
            ):
                raise MetaPeftError(
                    "dataset_name holds all splits: leave train_tasks, validation_tasks and test_tasks out (--train_tasks"
                    " null and so on where a config has them), or it."
                )
        elif self.streaming or self.dataset_config:
            raise MetaPeftError("streaming and dataset_config are of the dataset that dataset_name names: name it.")
        if self.max_rows is not None:
            at_least("max_rows", self.max_rows, 1)
            if not self.streaming:
                raise MetaPeftError("max_rows limits a stream: set streaming, or leave it out.")
        if self.split_fractions is not None:
            shares = self.split_fractions
            if len(shares) != 3 or not all(is_number(s) and s > 0 for s in shares) or abs(sum(shares) - 1) > 1e-6:
                raise MetaPeftError(
                    "split_fractions must be three positive numbers that add up to 1, for training, validation and test"
                    f" tasks; got {shares}."
                )
            if self.validation_tasks or self.test_tasks:
                raise MetaPeftError(
                    "split_fractions make validation and test tasks: leave validation_tasks and test_tasks out"
                    " (--validation_tasks null --test_tasks null where a config has them), or them."
                )
        self.new_names()

    def new_names(self) -> dict[str, str]:
        """What `rename_columns` says: new names by old ones."""
        pairs = [pair.partition("=") for pair in self.rename_columns or []]
        names = {old: new for old, _, new in pairs}
        if (
            not all(names)
            or not all(names.values())
            or len(names) < len(pairs)
            or len(set(names.values())) < len(names)
        ):
            raise MetaPeftError(
                f"rename_columns must be pairs such as sentence=text, each column once; got {self.rename_columns}."
            )
        return names
