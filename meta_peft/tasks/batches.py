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
TOKENS, MASK, LABELS, OF_DECODER = "input_ids", "attention_mask", "labels", "decoder_"


def episode_batch(
    support: Sequence[Inputs], query: Sequence[Inputs], tasks: Sequence[str] | None = None
) -> EpisodeBatch:
    """A batch of T tasks from what a model of `transformers` is called with: a dict of tensors for each task.

    Shorter rows are padded at their end: labels with -100, everything else with 0, which a mask leaves out. Where tasks
    differ in length and have no mask, they are given one.

    Args:
        support: for each task its rows as ``input_ids`` and ``attention_mask`` ``[R, L]`` or, for speech,
            ``input_features`` ``[R, features, frames]``, and as ``labels`` ``[R, L]``, or ``[R]`` for classes of rows; as
            many rows for every task; L may differ. Labels are -100 where nothing is to be predicted, as at padding.
            ``decoder_input_ids`` may be left out, as with `transformers`.
        query: other rows of the same tasks.
        tasks: their names; numbers by default.

    Raises:
        MetaPeftError: there are no labels, the shapes of a task do not fit each other, or the tasks do not have equally
            many rows and the same inputs.
    """
    if len(support) != len(query) or not support:
        raise MetaPeftError(
            f"Support and query rows are of the same tasks, one at least; got {len(support)} and {len(query)} tasks."
        )
    names = [str(i) for i in range(len(support))] if tasks is None else list(tasks)
    if len(names) != len(support):
        raise MetaPeftError(f"There are {len(support)} tasks and {len(names)} names for them.")
    return EpisodeBatch(_rows(support, "support", names), _rows(query, "query", names), names)


def _rows(of_tasks: Sequence[Inputs], which: str, names: Sequence[str]) -> Rows:
    checked = [_checked(i, f"Task {n!r}: its {which} rows") for i, n in zip(of_tasks, names, strict=True)]
    first = checked[0]
    for inputs in checked:
        if inputs.keys() != first.keys() or len(inputs[LABELS]) != len(first[LABELS]):
            raise MetaPeftError(
                f"All tasks of a batch have equally many {which} rows and the same inputs; got"
                f" {len(first[LABELS])} rows of {sorted(first)} and {len(inputs[LABELS])} of {sorted(inputs)}."
            )
    if TOKENS in first and MASK not in first and len({inputs[TOKENS].shape for inputs in checked}) > 1:
        checked = [{**inputs, MASK: torch.ones_like(inputs[TOKENS])} for inputs in checked]
    stacked = {name: _stacked([inputs[name] for inputs in checked], name) for name in checked[0]}
    hidden = _one_each(stacked) and not all(map(_one_each, checked))  # by padding: labels do not stand where tokens do
    labels = stacked.pop(LABELS)
    return Rows(stacked, pad(labels, (0, 1), value=IGNORED) if hidden else labels, len(checked))


def _checked(inputs: Inputs, rows: str) -> dict[str, Tensor]:
    """The tensors of one task, which fit each other as far as can be said of every kind of model; labels are ``[R, L]``."""
    _check_tensors(inputs, rows)
    labels = inputs[LABELS]
    given = {**inputs, LABELS: labels.unsqueeze(1) if labels.dim() == 1 else labels}
    _check_shapes(given, rows)
    _check_labels(given[LABELS], rows)
    return given


def _check_tensors(inputs: Inputs, rows: str) -> None:
    if not isinstance(inputs, Mapping):
        raise MetaPeftError(
            f"{rows} are a dict of tensors; got {type(inputs).__name__}. Give a list, with a dict for each task."
        )
    if LABELS not in inputs:
        raise MetaPeftError(f"{rows} have {sorted(inputs)}, and no labels, so nothing to predict: add them.")
    if not all(isinstance(tensor, Tensor) for tensor in inputs.values()):
        kinds = {name: type(tensor).__name__ for name, tensor in inputs.items()}
        raise MetaPeftError(f'{rows} are tensors, as tokenizers make them with return_tensors="pt"; got {kinds}.')


def _check_shapes(given: Inputs, rows: str) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    if given[LABELS].dim() != 2 or any(tensor.dim() < 2 for tensor in given.values()):
        raise MetaPeftError(
            f"{rows} are rows of tokens, [R, L], or of features, [R, features, frames], with labels [R, L] or [R]; got"
            f" {shapes}."
        )
    flat = {name: tensor.shape for name, tensor in given.items() if tensor.dim() == 2}
    of_answer = {shape for name, shape in flat.items() if name == LABELS or name.startswith(OF_DECODER)}
    of_tokens = {shape for name, shape in flat.items() if name != LABELS and not name.startswith(OF_DECODER)}
    n_rows = {len(tensor) for tensor in given.values()}
    if max(len(n_rows), len(of_answer), len(of_tokens)) > 1:
        raise MetaPeftError(
            f"{rows} are equally many in all tensors, their tokens and mask equally long, and what is {OF_DECODER}... as"
            f" long as labels; got {shapes}."
        )


def _check_labels(labels: Tensor, rows: str) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise MetaPeftError(
            f"{rows} have labels of type {labels.dtype}; expected whole numbers, of tokens or of classes."
        )
    wrong = labels[(labels < 0) & (labels != IGNORED)]
    if len(wrong):
        raise MetaPeftError(
            f"{rows} have the label {int(wrong[0])}; expected 0 or more, or {IGNORED} where nothing is to be predicted."
        )


def _one_each(inputs: Inputs) -> bool:
    """Whether there are as many labels as tokens, and no tokens of a decoder that say what labels stand at."""
    of_decoder = any(name.startswith(OF_DECODER) for name in inputs)
    return TOKENS in inputs and not of_decoder and inputs[LABELS].shape == inputs[TOKENS].shape


def _stacked(tensors: Sequence[Tensor], name: str) -> Tensor:
    if tensors[0].dim() > 2 and len({tensor.shape for tensor in tensors}) > 1:
        raise MetaPeftError(
            f"{name} have the shapes {[list(tensor.shape) for tensor in tensors]}; only rows of tokens are padded here."
            " Give all tasks features of the same size."
        )
    if tensors[0].dim() > 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    filling = IGNORED if name == LABELS else 0
    return torch.cat([pad(tensor, (0, longest - tensor.shape[1]), value=filling) for tensor in tensors])
