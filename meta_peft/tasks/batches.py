"""Episodes that somebody has as tensors already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.types import EpisodeBatch, Rows

Inputs = Mapping[str, Tensor]


def episode_batch(
    support: Sequence[Inputs], query: Sequence[Inputs], tasks: Sequence[str] | None = None
) -> EpisodeBatch:
    """A batch of T tasks from what a model of `transformers` is called with: a dict of tensors for each task.

    Shorter rows are padded at their end: labels with -100, everything else with 0, which a mask leaves out.

    Args:
        support: for each task its rows ``[R, L]`` as ``input_ids``, ``attention_mask`` and ``labels``, as many for every
            task; L may differ.
        query: other rows of the same tasks.
        tasks: their names; numbers by default.

    Raises:
        MetaPeftError: there are no labels, or the tasks do not have equally many rows and the same inputs.
    """
    if len(support) != len(query) or not support:
        raise MetaPeftError(
            f"Support and query rows are of the same tasks, one at least; got {len(support)} and {len(query)} tasks."
        )
    names = [str(i) for i in range(len(support))] if tasks is None else list(tasks)
    if len(names) != len(support):
        raise MetaPeftError(f"There are {len(support)} tasks and {len(names)} names for them.")
    return EpisodeBatch(_rows(support, "support"), _rows(query, "query"), names)


def _rows(of_tasks: Sequence[Inputs], which: str) -> Rows:
    first = of_tasks[0]
    for inputs in of_tasks:
        if "labels" not in inputs:
            raise MetaPeftError(
                f"The {which} rows have {sorted(inputs)}, and no labels, so nothing to predict: add them."
            )
        if inputs.keys() != first.keys() or len(inputs["labels"]) != len(first["labels"]):
            raise MetaPeftError(
                f"All tasks of a batch have equally many {which} rows and the same inputs; got"
                f" {len(first['labels'])} rows of {sorted(first)} and {len(inputs['labels'])} of {sorted(inputs)}."
            )
        if any(tensor.dim() != 2 for tensor in inputs.values()):
            raise MetaPeftError(f"Inputs are rows of tokens, [R, L]; got {[list(t.shape) for t in inputs.values()]}.")
    stacked = {name: _stacked([inputs[name] for inputs in of_tasks], IGNORED * (name == "labels")) for name in first}
    labels = stacked.pop("labels")
    return Rows(stacked, labels, len(of_tasks))


def _stacked(tensors: Sequence[Tensor], filling: int) -> Tensor:
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, longest - tensor.shape[1]), value=filling) for tensor in tensors])
