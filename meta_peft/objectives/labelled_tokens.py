"""The mean negative log-likelihood of the labelled tokens of each task.

``loss_t = mean over the labelled positions n of task t of -log softmax(logits_n)[label_n]``. Averaging within a task,
never over the stack, keeps a task's inner gradient independent of which tasks it happens to be stacked with.

Which position predicts which label is the one thing in which kinds of models differ: see the modules beside this one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.fitting import check_beside, check_known, check_read
from meta_peft.objectives.last_layer import last_layer_at
from meta_peft.ops.cross_entropy import cross_entropy
from meta_peft.types import Rows

IGNORED = -100
BINS = 15  # of confidence, for calibration


class TaskScores(NamedTuple):
    """Per task: the loss ``[T]`` and the share of rows whose every label is the most likely token ``[T]``.

    `calibration_TK3` has for each of K bins of confidence how many labelled positions fall into it, the sum of their
    confidences, and how many of them are right. A confidence is the probability of the most likely token given the right
    ones before it. Such counts add up over tasks, which a calibration error does not.

    `predicted_BL` is the most likely label at each labelled position, -100 elsewhere; `confidence_BL` its probability, 0
    elsewhere. A token is predicted given the right ones before it, so for text this is not what the model would write.
    """

    loss_T: Tensor
    exact_match_T: Tensor
    calibration_TK3: Tensor
    predicted_BL: Tensor
    confidence_BL: Tensor


def same_positions(labels_BL: Tensor) -> Tensor:
    return labels_BL


@dataclass(frozen=True)
class LabelledTokens:
    """The loss and the scores of a kind of model.

    Args:
        targets: from labels ``[B, L]`` to the token that each position has to predict, -100 where there is none.
        options: what the model is called with besides the rows' inputs.
        causal: whether a position sees none that come after it.
    """

    targets: Callable[[Tensor], Tensor] = same_positions
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = False

    def check(self, rows: Rows, n_known: int | None = None) -> None:
        """What is asked of rows when they are new: labels that a position which is read predicts, and that are known.

        Args:
            n_known: how many tokens or classes the model tells apart; None if that is not known.

        Raises:
            MetaPeftError: labels do not fit their rows.
        """
        check_beside("input_ids", rows)
        check_read(self.targets(rows.labels_BL) != IGNORED, rows)
        check_known(rows.labels_BL != IGNORED, rows, n_known)

    def inputs_of(self, model: Any, rows: Rows) -> dict[str, Tensor]:
        """What the model is called with for these rows."""
        return in_precision_of(model, rows.inputs)

    def loss_per_task(self, model: nn.Module, head: nn.Module | None, rows: Rows) -> Tensor:
        """One loss per task, ``[T]``."""
        logits_NV, labels_N, row_N = self.labelled_logits(model, head, rows)
        return _mean_per_task(cross_entropy(logits_NV, labels_N), row_N, rows)

    def scores_per_task(self, model: nn.Module, head: nn.Module | None, rows: Rows) -> TaskScores:
        """What one forward tells: a row matches if the most likely token is the label at all its positions."""
        logits_NV, labels_N, row_N = self.labelled_logits(model, head, rows)
        loss_T = _mean_per_task(cross_entropy(logits_NV, labels_N), row_N, rows)
        found_N, p_N = logits_NV.argmax(-1), _confidence(logits_NV)
        wrong_N = (found_N != labels_N).to(loss_T.dtype)
        n_rows = rows.labels_BL.shape[0]
        wrong_B = torch.zeros(n_rows, dtype=loss_T.dtype, device=loss_T.device).index_add(0, row_N, wrong_N)
        match_T = (wrong_B == 0).to(loss_T.dtype).view(rows.n_tasks, -1).mean(1)
        counts_TK3 = _calibration(p_N, wrong_N == 0, row_N // (n_rows // rows.n_tasks), rows.n_tasks)
        at_labels = (self._at_labels(found_N, rows, IGNORED), self._at_labels(p_N, rows, 0))
        return TaskScores(loss_T, match_T, counts_TK3, *at_labels)

    def log_likelihood_per_row(self, model: nn.Module, head: nn.Module | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """Each row's summed log-likelihood of its labels, and how many they are, ``[B]`` each."""
        logits_NV, labels_N, row_N = self.labelled_logits(model, head, rows)
        loss_N = cross_entropy(logits_NV, labels_N)
        zeros_B = loss_N.new_zeros(len(rows.labels_BL))
        return zeros_B.index_add(0, row_N, -loss_N), zeros_B.index_add(0, row_N, torch.ones_like(loss_N))

    def _at_labels(self, values_N: Tensor, rows: Rows, filling: int) -> Tensor:
        filled_BL = torch.full_like(rows.labels_BL, filling, dtype=values_N.dtype)
        targets_BL = self.targets(rows.labels_BL)
        filled_BL[:, -targets_BL.shape[1] :][targets_BL != IGNORED] = values_N
        return filled_BL

    def labelled_logits(self, model: nn.Module, head: nn.Module | None, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[N, V]``, labels ``[N]`` and row numbers ``[N]`` of the N labelled positions, and of no others.

        The head sees one contiguous ``[N, H]`` block: over a vocabulary, logits are the largest tensor there is. What a
        model does to hidden states before the head (a scale, a transform) or to logits after it, it does as ever.
        """
        targets_BL = self.targets(rows.labels_BL)
        row_N, position_N = (targets_BL != IGNORED).nonzero(as_tuple=True)
        check_every_task_has_labels(row_N, rows)
        inputs, (n_rows, length) = self.inputs_of(model, rows), rows.labels_BL.shape
        with ExitStack() as stack:
            if self.causal:
                inputs, length = _up_to(int(position_N.max()) + 1, inputs, rows.labels_BL.shape)
                place_N = stack.enter_context(last_layer_at(model, row_N, position_N, n_rows))
                length = length if place_N is position_N else int(place_N.max()) + 1
                position_N = place_N
            assert head is not None, "a language model has a head"
            read = stack.enter_context(_head_reads(head, row_N, position_N, (n_rows, length)))
            logits_NV = model(**inputs, **self.options).logits.squeeze(0)
        if read != [(n_rows, length)]:
            raise MetaPeftError(
                f"{type(model).__name__} does not make its logits by giving its output head, once, the activations of"
                f" {n_rows} rows of {length} tokens; it gave it {read or 'nothing'}. So it is not known which logits belong"
                " to a label: take a base of another type."
            )
        return logits_NV, targets_BL[targets_BL != IGNORED], row_N


def in_precision_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sound, for one, in the precision of the model's weights; numbers of tokens as they are."""
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def without_cache(model: Any) -> dict[str, bool]:
    """What keeps a decoder under a head from remembering keys and values, which nothing here reads."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _up_to(length: int, inputs: dict[str, Tensor], shape: torch.Size) -> tuple[dict[str, Tensor], int]:
    """The inputs without the positions after the last one that predicts anything, if each is ``[B, L]``; and how many."""
    if any(tensor.shape != shape for tensor in inputs.values()):
        return inputs, shape[1]
    return {name: tensor[:, :length] for name, tensor in inputs.items()}, length


def check_every_task_has_labels(row_N: Tensor, rows: Rows) -> None:
    """Its loss would be the mean of nothing, which is no number, and its gradient 0."""
    task_N = row_N // (rows.labels_BL.shape[0] // rows.n_tasks)
    without = (torch.bincount(task_N, minlength=rows.n_tasks) == 0).nonzero().flatten().tolist()
    if without:
        raise MetaPeftError(
            f"Task {without[0]} of a stack of {rows.n_tasks} has no label that a token before it could predict: give each"
            " task a row with an answer."
        )


def _mean_per_task(loss_N: Tensor, row_N: Tensor, rows: Rows) -> Tensor:
    task_N = row_N // (rows.labels_BL.shape[0] // rows.n_tasks)
    zeros_T = loss_N.new_zeros(rows.n_tasks)
    count_T = zeros_T.index_add(0, task_N, torch.ones_like(loss_N))
    return zeros_T.index_add(0, task_N, loss_N) / count_T


def _confidence(logits_NV: Tensor) -> Tensor:
    """The probability of the most likely label; of a model that diverged, 0."""
    logits_NV = logits_NV.float()
    return (logits_NV.amax(-1) - logits_NV.logsumexp(-1)).exp().nan_to_num(0.0)


def _calibration(p_N: Tensor, right_N: Tensor, task_N: Tensor, n_tasks: int) -> Tensor:
    bin_N = (p_N * BINS).ceil().long().clamp(1, BINS) - 1
    counts_N3 = torch.stack([torch.ones_like(p_N), p_N, right_N.float()], 1)
    return p_N.new_zeros(n_tasks * BINS, 3).index_add(0, task_N * BINS + bin_N, counts_N3).view(n_tasks, BINS, 3)


@contextmanager
def _head_reads(
    head: nn.Module, row_N: Tensor, position_N: Tensor, expected: tuple[int, int]
) -> Iterator[list[tuple[int, ...]]]:
    """Forwards inside this context give the head the labelled positions alone, where it gets ``[*expected, H]``.

    Gives what it got, without H, at each call: some models put tokens in front, or compute logits without their head.
    """
    read: list[tuple[int, ...]] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        read.append(tuple(args[0].shape[:-1]))
        return (args[0][row_N, position_N].unsqueeze(0),) if read[-1] == expected else None

    hook = head.register_forward_pre_hook(gather, prepend=True)  # so that others see what the head sees
    try:
        yield read
    finally:
        hook.remove()
