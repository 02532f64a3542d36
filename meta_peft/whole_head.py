"""A classification head in float32 on a base in bfloat16: the head is learned, and bfloat16 swallows small steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.fast_weights import HEADS

LOW = (torch.bfloat16, torch.float16)


def keep_heads_whole(model: nn.Module) -> None:
    """Put the classification heads of `model` into float32. What comes into them is converted.

    PEFT copies a head with its hook, so that each adapter's own is whole too.
    """
    for name, head in model.named_children():
        if name.endswith(HEADS) and any(parameter.dtype in LOW for parameter in head.parameters()):
            head.float().register_forward_pre_hook(_in_float32)


def _in_float32(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in LOW else x for x in inputs)
