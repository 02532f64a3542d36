"""transformers' "sdpa" attention through `ops.attention`, for as long as what is computed will be differentiated twice.

Models look their attention up by name at every forward, so the entry of that name is another one for a while. torch's
own is the reference that it is tested against, and what runs for the cases that the formulas do not cover.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from meta_peft.ops.attention import attention

# With one of these attention is something else. All others that it does not name transformers' "sdpa" ignores.
OTHERWISE = ("position_bias", "cache", "softcap", "output_attentions", "s_aux")


@contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    """Inside this context attention has a second derivative: as one operation, or as torch's matrix products.

    Fused kernels have none. An "sdpa" that somebody else has registered is left alone.
    """
    registered = AttentionInterface()["sdpa"]  # of a new instance: what all of them share
    with sdpa_kernel(SDPBackend.MATH):
        if registered is not sdpa_attention_forward:
            yield
            return
        AttentionInterface.register("sdpa", _attention_forward)
        try:
            yield
        finally:
            AttentionInterface.register("sdpa", registered)


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The arguments and the results of transformers' `sdpa_attention_forward`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    if (
        dropout
        or any(_is_given(others.get(name)) for name in OTHERWISE)
        or (causal and query.shape[2] != key.shape[2])
        or not _is_plain(query, key, value, attention_mask, getattr(module, "num_key_value_groups", 1))
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)
    if causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril_()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, n_groups: int) -> bool:
    """Whether these are ``[B, H, L, D]``, twice ``[B, H / n_groups, S, D]`` and a mask that is no parameter."""
    return (
        query.dim() == 4
        and query.shape == (len(key), key.shape[1] * n_groups, query.shape[2], key.shape[3])
        and key.shape[:3] == value.shape[:3]
        and query.dtype == key.dtype == value.dtype
        and not query.is_nested
        and not (query.device.type != "meta" and torch.is_autocast_enabled(query.device.type))
        and (mask is None or (not mask.requires_grad and mask.dtype in (torch.bool, query.dtype)))
    )


def _is_given(argument: Any) -> bool:
    return argument is not None and argument is not False
