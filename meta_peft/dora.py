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
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from meta_peft.fast_weights import lora_layers
from meta_peft.frozen_linear import dequantise, frozen_product, quantised_layers


def dora_forwards(model: PeftModel, adapter: str) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """The modules that hold the magnitudes m of `adapter`, with the forward that PEFT is to call on them."""
    for _, layer in lora_layers(model, adapter):
        if adapter in layer.lora_magnitude_vector:
            magnitudes: Any = layer.lora_magnitude_vector[adapter]
            yield magnitudes, partial(_forward, magnitudes, _norm2(layer.get_base_layer(), magnitudes.fan_in_fan_out))


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
    crossed = (b * _times_frozen(a, base_layer).transpose(-1, -2)).sum(-1)
    own = ((b @ (a @ a.transpose(-1, -2))) * b).sum(-1)
    ratio = m / (norm2_O.to(a) + 2 * scaling * crossed + scaling**2 * own).sqrt()
    if ratio.dim() == 2:
        ratio = ratio.repeat_interleave(x.shape[0] // ratio.shape[0], 0).unsqueeze(1)  # [T, out] -> [T * R, 1, out]
    product = base_result if base_layer.bias is None else base_result - base_layer.bias
    adapted: Tensor = (ratio - 1) * product + ratio * lora_B(lora_A(x)) * scaling
    return adapted


def _times_frozen(a: Tensor, layer: Any) -> Tensor:
    """``A W^T`` for the weight of a frozen layer, quantised or not."""
    if quantised_layers(layer):
        product = frozen_product(a, layer)
        return product if layer.bias is None else product - layer.bias.to(product.dtype)
    return F.linear(a, layer.weight.to(a.dtype) if isinstance(layer, nn.Linear) else layer.weight.T.to(a.dtype))


@torch.no_grad()
def _norm2(layer: nn.Module, transposed: bool) -> Tensor:
    """``|W_o|^2``, a constant, ``[out]``."""
    weight: Any = dequantise(layer) if quantised_layers(layer) else layer.weight
    wide: Tensor = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
    return wide.sum(0 if transposed else 1)
