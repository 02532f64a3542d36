"""DoRA with the whole derivative of its norm.

``y = m / n * (x W^T + s x A^T B^T) + b`` with ``n_o = |W_o + s B_o A|``, the norm of each row of the adapted weight. PEFT,
after section 4.3 of the paper (Liu et al. 2024, arXiv 2402.09353), takes n for a constant in backward. That direction is
good enough to train along, but it is not the gradient of the loss, and then neither is what is differentiated through
it. Here n has its derivative: the values are PEFT's, and an inner step follows the gradient.

``n_o^2 = |W_o|^2 + 2 s B_o . (A W_o) + s^2 B_o (A A^T) B_o^T`` takes no matrix of the size of W for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from meta_peft.frozen.linear import frozen_product, frozen_weight
from meta_peft.lora.fast_weights import lora_layers


def dora_forwards(model: PeftModel, adapter: str) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """The modules that hold the magnitudes m of `adapter`, with the forward that PEFT is to call on them."""
    for _, layer in lora_layers(model, adapter):
        if adapter in layer.lora_magnitude_vector:
            magnitudes: Any = layer.lora_magnitude_vector[adapter]
            yield magnitudes, partial(_forward, magnitudes, _norm2(layer.get_base_layer()))


def _forward(
    magnitudes: Any,
    norm2_O: Tensor,
    x: Tensor,
    *,
    lora_A: nn.Linear,
    lora_B: nn.Linear,
    scaling: float,
    base_layer: Any,
    base_result: Tensor,
    **_: Any,
) -> Tensor:
    """What DoRA adds to `base_result`; A, B and m are one task's, or stacks of T tasks'."""
    a, b, m = lora_A.weight, lora_B.weight, magnitudes.weight
    crossed = (b * frozen_product(a, base_layer, with_bias=False).transpose(-1, -2)).sum(-1)
    own = ((b @ (a @ a.transpose(-1, -2))) * b).sum(-1)
    ratio = m / (norm2_O.to(a) + 2 * scaling * crossed + scaling**2 * own).sqrt()
    if ratio.dim() == 2:
        ratio = ratio.repeat_interleave(x.shape[0] // ratio.shape[0], 0).unsqueeze(1)  # [T, out] -> [T * R, 1, out]
    product = base_result if base_layer.bias is None else base_result - base_layer.bias
    adapted: Tensor = (ratio - 1) * product + ratio * lora_B(lora_A(x)) * scaling
    return adapted


@torch.no_grad()
def _norm2(layer: Any) -> Tensor:
    """``|W_o|^2``, a constant, ``[out]``."""
    return frozen_weight(layer, torch.promote_types(layer.weight.dtype, torch.float32)).square().sum(1)
