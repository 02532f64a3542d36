"""Next-token prediction on the labelled positions of each row.

``loss_t = mean over the labelled positions of task t of -log p(label | tokens before it)``. Averaging within a task,
never over the stack, keeps a task's inner gradient independent of which tasks it happens to be stacked with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.ops.cross_entropy import cross_entropy
from meta_peft.types import Rows

IGNORED = -100


@dataclass(frozen=True)
class TaskScores:
    """Per task: the loss ``[T]`` and the share of rows whose every label is the most likely token ``[T]``."""

    loss_T: Tensor
    exact_match_T: Tensor


def labelled_logits(model: nn.Module, head: nn.Module, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[N, V]``, labels ``[N]`` and row numbers ``[N]`` of the N labelled positions, and of no others.

    The head sees one contiguous ``[N, H]`` block: over a vocabulary, logits are the largest tensor there is.
    """
    targets_BL = rows.labels_BL[:, 1:]  # the token at position p is predicted from position p - 1
    row_N, position_N = (targets_BL != IGNORED).nonzero(as_tuple=True)
    with _head_reads(head, row_N, position_N):
        logits_NV = model(**rows.inputs, use_cache=False).logits.squeeze(0)
    return logits_NV, targets_BL[row_N, position_N], row_N


def loss_per_task(model: nn.Module, head: nn.Module, rows: Rows) -> Tensor:
    """One loss per task, ``[T]``."""
    logits_NV, labels_N, row_N = labelled_logits(model, head, rows)
    return _mean_per_task(_token_losses(logits_NV, labels_N), row_N, rows)


def scores_per_task(model: nn.Module, head: nn.Module, rows: Rows) -> TaskScores:
    """Loss and exact match per task.

    A row matches if the most likely token is the label at every labelled position given the labels before it. That is
    the case exactly when greedy decoding from the prompt writes the labels, so nothing has to be generated.
    """
    logits_NV, labels_N, row_N = labelled_logits(model, head, rows)
    loss_T = _mean_per_task(_token_losses(logits_NV, labels_N), row_N, rows)
    wrong_N = (logits_NV.argmax(-1) != labels_N).to(loss_T.dtype)
    n_rows = rows.labels_BL.shape[0]
    wrong_B = torch.zeros(n_rows, dtype=loss_T.dtype, device=loss_T.device).index_add(0, row_N, wrong_N)
    match_T = (wrong_B == 0).to(loss_T.dtype).view(rows.n_tasks, -1).mean(1)
    return TaskScores(loss_T, match_T)


def _token_losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return cross_entropy(logits_NV, labels_N)


def _mean_per_task(loss_N: Tensor, row_N: Tensor, rows: Rows) -> Tensor:
    task_N = row_N // (rows.labels_BL.shape[0] // rows.n_tasks)
    zeros_T = loss_N.new_zeros(rows.n_tasks)
    count_T = zeros_T.index_add(0, task_N, torch.ones_like(loss_N))
    return zeros_T.index_add(0, task_N, loss_N) / count_T


@contextmanager
def _head_reads(head: nn.Module, row_N: Tensor, position_N: Tensor) -> Iterator[None]:
    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (args[0][row_N, position_N].unsqueeze(0),)

    hook = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()
