"""What the frozen base says of rows, on its own: a vector for each prompt, and how uncertain it is of each answer.

The adapter is switched off, so the numbers are the same before, during and after meta-training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.functional.model_modes import evaluation_mode
from meta_peft.objectives import CLASSIFYING, objective_for, objective_name
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.collate import EpisodeCollator
from meta_peft.tasks.support_selection import Array, EncodedRow
from meta_peft.types import Rows

ANSWERED_INSIDE = ("causal_lm", "masked_lm")  # objectives whose labels are tokens of what the model reads


class BaseView:
    """
    Args:
        model: a `PeftModel`; it is left unchanged.
        collate: pads rows.
        objective: a name of `OBJECTIVES`; by default what the model is made for.
        rows_per_forward: how many rows go through the base at once.
        labelled: whether rows have answers; otherwise their labels only mark the places of what is to be predicted.
    """

    def __init__(
        self,
        model: Any,
        collate: EpisodeCollator,
        *,
        objective: str | None = None,
        rows_per_forward: int = 32,
        labelled: bool = True,
    ):
        self._model, self._base, self._collate = model, model.get_base_model(), collate
        self._objective = objective_for(self._base, objective)
        name = objective or objective_name(self._base)
        self._answers_inside, self._classifies = name in ANSWERED_INSIDE, name in CLASSIFYING
        self._rows_per_forward, self._labelled = rows_per_forward, labelled

    def vectors(self, rows: Sequence[EncodedRow]) -> Array:
        """The last hidden states, averaged over the tokens of the prompt, ``[n, H]``; over all tokens without a prompt.

        Of an encoder-decoder it is the encoder's states, and where a head answers all tokens are the prompt.
        """
        config, body = self._base.config, self._base.base_model
        encodes = bool(getattr(config, "is_encoder_decoder", False))
        if encodes:
            body = self._base.get_encoder()

        def measure(stack: Rows) -> Tensor:
            inputs = {n: t for n, t in stack.inputs.items() if not (encodes and n.startswith("decoder_"))}
            states_BLH = body(**inputs).last_hidden_state
            mask_BL = inputs.get("attention_mask")
            if mask_BL is None or mask_BL.shape != states_BLH.shape[:2]:  # sound: frames are not masked
                return states_BLH.float().mean(1)
            prompt_BL = mask_BL.bool()
            if self._answers_inside:
                prompt_BL = prompt_BL & (stack.labels_BL == IGNORED)
            prompt_BL = torch.where(prompt_BL.any(1, keepdim=True), prompt_BL, mask_BL.bool())
            weight_BL1 = prompt_BL[..., None].float()
            return (states_BLH.float() * weight_BL1).sum(1) / weight_BL1.sum(1)

        return self._measured(measure, rows)

    def uncertainty(self, rows: Sequence[EncodedRow]) -> Array:
        """The loss of each row's answer ``[n]``; without answers, the mean entropy of what is predicted at its labels.

        Raises:
            MetaPeftError: the base has a head that tells no row from another.
        """
        objective, head = self._objective, self._base.get_output_embeddings()

        def entropy(stack: Rows) -> Tensor:
            logits_NV, _, row_N = objective.labelled_logits(self._base, head, stack)
            entropy_N = torch.distributions.Categorical(logits=logits_NV.float(), validate_args=False).entropy()
            total_B, n_B = (torch.zeros(stack.n_tasks, device=entropy_N.device) for _ in range(2))
            return total_B.index_add(0, row_N, entropy_N) / n_B.index_add(0, row_N, torch.ones_like(entropy_N))

        def loss(stack: Rows) -> Tensor:
            return objective.loss_per_task(self._base, head, stack)

        found = self._measured(loss if self._labelled else entropy, rows)
        if self._classifies and len(rows) > 1 and np.ptp(found) == 0:
            raise MetaPeftError(
                "The base alone is equally uncertain of all rows, as it is where the classification head is new: there is"
                " nothing to choose by. Use balanced or diverse."
            )
        return found

    def _measured(self, measure: Callable[[Rows], Tensor], rows: Sequence[EncodedRow]) -> Array:
        device = self._base.get_input_embeddings().weight.device
        found = []
        with torch.no_grad(), evaluation_mode(self._model), _without_adapter(self._model):
            for start in range(0, len(rows), self._rows_per_forward):
                part = rows[start : start + self._rows_per_forward]
                stack = self._collate.rows([[row] for row in part]).to(device)  # each row a task of its own
                found.append(measure(stack).float().cpu().numpy())
        return np.concatenate(found)


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """PEFT's own switch, which also sets what needs a gradient; afterwards that is as it was."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, needs_gradient in wanted:
            parameter.requires_grad_(needs_gradient)
