"""The classification head of a base: in float32, since it is learned, and from zero where the checkpoint has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.fast_weights import HEADS

LOW = (torch.bfloat16, torch.float16)


def keep_heads_whole(model: nn.Module) -> None:
    """Put the classification heads of `model` into float32, for bfloat16 swallows small steps. What comes in is converted.

    PEFT copies a head with its hook, so that each adapter's own is whole too.
    """
    for name, head in model.named_children():
        if name.endswith(HEADS) and any(parameter.dtype in LOW for parameter in head.parameters()):
            head.float().register_forward_pre_hook(_in_float32)


def _in_float32(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in LOW else x for x in inputs)


def start_at_zero(model: nn.Module) -> None:
    """Set the last layer of the heads of `model` to zero, so that all classes are alike before the first example.

    What a number stands for changes from task to task, so a start that prefers one is wrong for most (Ye and Chao,
    ICLR 2022, arXiv 2106.16245). The first step then makes each class's weights of its examples.
    """
    heads = [head for name, head in model.named_children() if name.endswith(HEADS)]
    last = [layer for head in heads for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
