"""The classification head of a base: in float32, from zero where the checkpoint has none, and if that is learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.errors import MetaPeftError
from meta_peft.inner_optimizers import InnerRule
from meta_peft.lora.fast_weights import HEADS, FastWeights, active_adapter, head_modules

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
    heads = ((name, head) for name, head in model.named_children() if name.endswith(HEADS))
    for _, layer in _last_linear(heads):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def last_layer(model: Any) -> frozenset[str]:
    """The fast weights that give each class its score, by the names of `FastWeights`; none of a model without a head.

    Their start is left at zero where class numbers mean nothing (Kao, Chiu and Chen, ICLR 2022, arXiv 2106.15367).
    """
    found = _last_linear(head_modules(model, active_adapter(model)))
    return frozenset(f"{path}.{name}" for path, layer in found for name, _ in layer.named_parameters())


def _last_linear(heads: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Linear]]:
    """The last linear layer of all heads, with its path; none of no heads."""
    layers = [
        (path, layer)
        for head_path, head in heads
        for path, layer in head.named_modules(prefix=head_path)
        if isinstance(layer, nn.Linear)
    ]
    return layers[-1:]


def fixed_start(model: Any, rule: InnerRule, learn_head: bool | None) -> frozenset[str]:
    """The weights that inner steps move and the outer loop does not, where it is not to learn the head (`learn_head`).

    Raises:
        MetaPeftError: `learn_head` is False, and no head of the model is adapted.
    """
    last = last_layer(model)
    adapts = last <= set(rule.fast_names(FastWeights(model).parameters()))
    if learn_head is None:
        return last if adapts else frozenset()
    if not last:
        raise MetaPeftError("learn_head=False needs a classification head, and this model has none. Leave it out.")
    if not adapts:
        raise MetaPeftError(
            f"learn_head=False needs a head that adapts, and fast_weights={rule.fast!r} leaves it alone: it would stay as"
            " it is. Leave learn_head out, or let fast_weights have the head as well."
        )
    return last
