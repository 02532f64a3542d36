"""The weight of a frozen layer in full, at the moment of use, wherever it is kept between uses.

A base too large for one device keeps its weights elsewhere: in shards on all processes (FSDP2, ZeRO-3), in main memory
or on disk (a device map). Whoever computes with such a weight asks for it here, in a forward, a backward or a backward
of that, and drops it afterwards. So no graph holds it, and derivatives of every order are those of a resident base.
A weight in shards is gathered by all processes together: each has to ask for the same weights in the same order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole_weight(layer: nn.Module) -> Tensor:
    """``layer.weight`` in full, detached, on the device that computes with it; of a 4-bit layer, its codes."""
    weight: Any = layer.weight
    if isinstance(weight, DTensor):
        shards: Any = weight.detach()
        return shards.full_tensor()
    if _is_zero3(weight):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):  # afterwards the parameter is empty, and what was gathered is ours alone
            return weight.detach()
    if is_elsewhere(layer):
        hook: Any = layer._hf_hook  # Accelerate's, which brings weights where the layer's own forward runs
        hook = next(h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "weights_map", None) is not None)
        return hook.weights_map["weight"].to(hook.execution_device)
    return weight.detach()


def is_elsewhere(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is not here in full between uses. One without values is nowhere (see `weightless`)."""
    weight: Any = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and (
        isinstance(weight, DTensor)
        or _is_zero3(weight)
        or (weight.device.type == "meta" and hasattr(layer, "_hf_hook"))
    )


def _is_zero3(weight: Any) -> bool:
    return hasattr(weight, "ds_id")
