"""The last decoder layer, behind its attention, only at the positions that predict something.

Other positions are read by that attention and by nothing after it, so its feed-forward part, three quarters of a
layer's products, is for them in vain. This needs the layer's formula, and so its exact class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.utils.forwards import replaced_forwards

LAYERS = {f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@contextmanager
def last_layer_at(model: nn.Module, row_N: Tensor, position_N: Tensor, n_rows: int) -> Iterator[Tensor]:
    """Forwards inside this context narrow ``[B, L, H]`` to ``[B, P, H]``, P the most labelled positions of a row.

    Gives the place ``[N]`` of each labelled position among the P of its row, or `position_N` if the model's last layer
    is of no known class.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or type(layers[-1]).__name__.removeprefix("FSDP") not in LAYERS:
        yield position_N
        return
    count_B = torch.bincount(row_N, minlength=n_rows)
    place_N = torch.arange(len(row_N), device=row_N.device) - (count_B.cumsum(0) - count_B)[row_N]
    kept_BP = position_N.new_zeros(n_rows, int(count_B.max()))
    kept_BP[row_N, place_N] = position_N
    with replaced_forwards([(layers[-1], partial(_forward, layers[-1], kept_BP))]):
        yield place_N


def _forward(layer: Any, kept_BP: Tensor, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    hidden_states = hidden_states[torch.arange(len(kept_BP), device=kept_BP.device)[:, None], kept_BP]
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
