"""From a row of data to what a model is called with and what it has to answer: one file for each kind of model.

Each file has two functions. `encode(row, how)` makes features, a dict by the names that models give them: `input_ids` or
`input_features`, `labels`, and where the model writes with a decoder `decoder_input_ids`. `with_label(features, label,
how)` makes the features of the same row with another answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meta_peft.objectives import CLASSIFYING, check_objective
from meta_peft.tasks.collate import EpisodeCollator
from meta_peft.tasks.encoding import (
    causal_lm,
    masked_lm,
    seq2seq_lm,
    sequence_classification,
    speech_seq2seq,
    token_classification,
)
from meta_peft.tasks.encoding.classes import class_names, each, names_of_task, whole_number
from meta_peft.tasks.encoding.facts import IDS, NUMBERS, Facts, facts_of, tokenizer_of
from meta_peft.tasks.multiple_choice import CHOICES, encode_with_choices
from meta_peft.tasks.prompt import PromptFormat, example_columns

__all__ = ["Encoding", "Facts", "tokenizer_of"]

_KINDS: dict[str, Any] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "seq2seq_lm": seq2seq_lm,
    "speech_seq2seq": speech_seq2seq,
    "sequence_classification": sequence_classification,
    "token_classification": token_classification,
}


@dataclass(frozen=True)
class Encoding:
    """``row -> features``, for the kind of model that `objective` names.

    Args:
        objective: a name of `meta_peft.objectives.OBJECTIVES`.
        prompt_format: how a row becomes text.
        processor: the base's tokenizer, or for speech its processor.
        max_length: of a row in tokens.
        facts: what has to be known of the base besides; `Encoding.of` reads it off a model.
    """

    objective: str
    prompt_format: PromptFormat
    processor: Any
    max_length: int
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        check_objective(self.objective)

    @classmethod
    def of(cls, base: Any, objective: str, prompt_format: PromptFormat, processor: Any, max_length: int) -> Encoding:
        """With the facts that the model `base` states."""
        return cls(objective, prompt_format, processor, max_length, facts_of(base, objective, processor))

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processor)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with a column `choices` has the tokens of its answers beside its own (see `multiple_choice`)."""
        if CHOICES in row and self.objective not in CLASSIFYING:
            return encode_with_choices(row, example_columns(row.keys())[-1], self)
        encode: Callable[..., dict[str, Any]] = _KINDS[self.objective].encode
        return encode(row, self)

    def with_label(self, features: Mapping[str, Any], label: Any) -> dict[str, Any]:
        """The same row with another answer: a text, put into the completion's template, or the number of a class."""
        relabel: Callable[..., dict[str, Any]] = _KINDS[self.objective].with_label
        return relabel(features, label, self)

    def collator(self) -> EpisodeCollator:
        """What stacks the rows of this encoding."""
        return EpisodeCollator(self.tokenizer.pad_token_id)

    def naming(self, labels: Iterable[Any], *, kept: bool = True) -> Encoding:
        """With one number for each name among `labels`, those of all tasks together, if the head has so many classes.

        Else it stays as it is, and each task numbers its own names (see `of_task`). Where labels are numbers, they are
        those of the classes that the head learns, if training has `kept` them; else they tell the classes of a task apart
        and no more.
        """
        if self._shared:
            return self
        found = set(each(labels))
        names = class_names(found)
        if len(names) < len(found) and all(whole_number(name) is not None for name in names):
            return self._with(labels=NUMBERS if kept else IDS)
        return self if len(names) > self.facts.num_labels else self._with(label_names=names)

    def of_task(self, rows: Sequence[Mapping[str, Any]]) -> Encoding:
        """With the names of one task's classes, in alphabetical order, unless all tasks share theirs."""
        if self._shared:
            return self
        kind: Any = _KINDS[self.objective]
        return self._with(label_names=names_of_task([kind.label(row) for row in rows], self.facts))

    def of_tasks(
        self, rows_of: Callable[[str], list[dict[str, Any]]], names: Iterable[str]
    ) -> Encoding | dict[str, Encoding]:
        """`of_task` for each of the tasks called `names`, whose rows `rows_of` gives; itself if it is the same for all."""
        if self._shared:
            return self
        return {name: self.of_task(rows_of(name)) for name in names}

    @property
    def _shared(self) -> bool:
        """Whether a label means the same in all tasks: it is a text to be written, or the head knows its classes."""
        return self.objective not in CLASSIFYING or bool(self.facts.label_names) or self.facts.labels == NUMBERS

    def _with(self, **facts: Any) -> Encoding:
        return replace(self, facts=replace(self.facts, **facts))
