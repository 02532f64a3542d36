"""Tokens that all rows of a stack stand behind: a model reads them once, and reads each row on from there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meta_peft.frozen.prefix import DECODERS, MIXTURES_OF_EXPERTS


def reads_on(base: Any) -> bool:
    """Whether keys and values of what came before are all that a model needs to read on: for the types that are tested."""
    return base.config.model_type in {*DECODERS, *MIXTURES_OF_EXPERTS}


class SharedPrompt:
    """The keys and values of a prompt, as a causal model has them now.

    Args:
        base: the model, the adapter's weights in its layers.
        tokens: of the prompt, at least one.
    """

    @torch.no_grad()
    def __init__(self, base: Any, tokens: Sequence[int], device: torch.device):
        self._forward = base.forward
        ids_1P = torch.tensor([tokens], device=device)
        # By the whole model, as what shards a base hooks into; the last position's logits are as few as there can be.
        found = base(input_ids=ids_1P, attention_mask=torch.ones_like(ids_1P), use_cache=True, logits_to_keep=1)
        self._known = found.past_key_values
        self.length = len(tokens)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """The model's forward for rows ``[B, L]`` that stand behind the prompt; their positions go on from its end."""
        assert not torch.is_grad_enabled(), "keys and values of the prompt are constants"
        n_rows = len(input_ids)
        known = copy.deepcopy(self._known)  # a forward adds its own
        known.batch_repeat_interleave(n_rows)
        mask = torch.cat([attention_mask.new_ones(n_rows, self.length), attention_mask], 1)
        return self._forward(input_ids=input_ids, attention_mask=mask, past_key_values=known, **options)
