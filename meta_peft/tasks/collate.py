"""Stack the episodes of T tasks into the tensors of one `EpisodeBatch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.multiple_choice import stacked_choices
from meta_peft.types import Episode, EpisodeBatch, Rows


@dataclass(frozen=True)
class EpisodeCollator:
    """Task-major rows, padded on the right to the longest row of the stack."""

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
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, :n] = torch.tensor(row["labels"])
            mask[i, :n] = 1
        return Rows({"input_ids": ids, "attention_mask": mask}, labels, len(tasks), stacked_choices(rows))
