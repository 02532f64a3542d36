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
from meta_peft.functional.adapter_loss import evaluation_mode
from meta_peft.objectives import objective_for
from meta_peft.objectives.labelled_tokens import IGNORED, LabelledTokens
from meta_peft.tasks.collate import EpisodeCollator
from meta_peft.tasks.support_selection import Array, EncodedRow
from meta_peft.types import Rows


class BaseView:
    """
    Args:
        model: a `PeftModel`; it is left unchanged.
        collate: pads rows.
        objective: a name of `OBJECTIVES`; by default what the model is made for.
        rows_per_forward: how many rows go through the base at once.
        labelled: whether rows have answers; otherwise each row's one label only marks the place after its prompt.
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
        self._rows_per_forward, self._labelled = rows_per_forward, labelled

    def vectors(self, rows: Sequence[EncodedRow]) -> Array:
        """The last hidden states, averaged over the tokens of the prompt, ``[n, H]``; over all tokens without a prompt.

        Of an encoder-decoder it is the encoder's states.
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
            if stack.labels_BL.shape == prompt_BL.shape:
                prompt_BL = prompt_BL & (stack.labels_BL == IGNORED)
            prompt_BL = torch.where(prompt_BL.any(1, keepdim=True), prompt_BL, mask_BL.bool())
            weight_BL1 = prompt_BL[..., None].float()
            return (states_BLH.float() * weight_BL1).sum(1) / weight_BL1.sum(1)

        return self._measured(measure, rows)

    def uncertainty(self, rows: Sequence[EncodedRow]) -> Array:
        """The loss of each row's answer ``[n]``; without answers, the entropy of the next token after its prompt."""
        objective, head = self._objective, self._base.get_output_embeddings()
        if self._labelled:
            return self._measured(lambda stack: objective.loss_per_task(self._base, head, stack), rows)
        if not isinstance(objective, LabelledTokens):
            raise MetaPeftError(
                "Rows without answers have an entropy for models that write text only: add the answers."
            )

        def entropy(stack: Rows) -> Tensor:
            logits_NV, _, _ = objective.labelled_logits(self._base, head, stack)
            return torch.distributions.Categorical(logits=logits_NV.float(), validate_args=False).entropy()

        return self._measured(entropy, rows)

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
