"""Stack the episodes of T tasks into the tensors of one `EpisodeBatch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.multiple_choice import stacked_choices
from meta_peft.types import Episode, EpisodeBatch, Rows

TOKENS = ("input_ids", "decoder_input_ids")
OTHERS = ("input_features", "token_type_ids")  # padded with zeros


def row_length(row: Mapping[str, Any]) -> int:
    """How much a model reads of an encoded row: its tokens, or what it has to write about a sound of fixed length."""
    return len(row["input_ids"] if "input_ids" in row else row["labels"])


@dataclass(frozen=True)
class EpisodeCollator:
    """Task-major rows, each feature padded at its end to the longest of the stack.

    A row is a dict of features by the names that models give them: `input_ids`, `decoder_input_ids`, `token_type_ids`,
    `input_features` ``[mel, frames]``, and `labels`, which has a length of its own. What else is in it, such as the name
    of its task, is left out.
    """

    pad_token_id: int

    def __call__(self, episodes: Sequence[Episode]) -> EpisodeBatch:
        return EpisodeBatch(
            self.rows([e.support for e in episodes]),
            self.rows([e.query for e in episodes]),
            [e.task for e in episodes],
        )

    def stacks(self, episodes: Sequence[Episode], size: int) -> list[EpisodeBatch]:
        """Batches of `size` episodes each, in the order given."""
        return [self(episodes[i : i + size]) for i in range(0, len(episodes), size)]

    def rows(self, tasks: Sequence[Sequence[dict[str, Any]]]) -> Rows:
        """Encoded rows of several tasks, the same number for each, as one stack."""
        rows = [row for task in tasks for row in task]
        if any(all(label == IGNORED for label in row["labels"]) for row in rows):
            raise MetaPeftError(
                "A row has no labelled token, so there is nothing to learn from it: label its completion."
            )
        inputs = {
            name: _padded([row[name] for row in rows], self.pad_token_id if name in TOKENS else 0)
            for name in (*TOKENS, *OTHERS)
            if name in rows[0]
        }
        if "input_ids" in inputs:
            inputs["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        return Rows(inputs, _padded([row["labels"] for row in rows], IGNORED), len(tasks), stacked_choices(rows))


def _padded(values: Sequence[Any], filling: int) -> Tensor:
    """Sequences, or arrays whose last dimension differs, as one tensor."""
    tensors = [torch.as_tensor(value) for value in values]
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([pad(tensor, (0, longest - tensor.shape[-1]), value=filling) for tensor in tensors])
