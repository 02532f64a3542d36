"""How many bytes of dequantised weights a meta-gradient hands to autograd to keep.

bitsandbytes' 4-bit backward multiplies with a dequantised copy of the weight; differentiated again, autograd keeps that
copy, for each layer and inner step. Counted are floating-point tensors in the shape of a quantised layer's weight that
are saved for a backward during one task's meta-gradient.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from contenders import CONTENDERS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from workload import LINEARS, Workload, load_model, random_batch, save_base


def saved_weight_bytes(workload: Workload, contender: str, **settings: Any) -> dict[str, int]:
    """Bytes of weights saved, and of everything that was saved."""
    one_task = replace(workload, tasks=1)
    with tempfile.TemporaryDirectory() as folder:
        save_base(one_task, Path(folder))
        model = load_model(one_task, Path(folder))
    shapes = _weight_shapes(model)
    step = CONTENDERS[contender](model, random_batch(one_task), one_task, **settings)
    counted = {"weight_bytes": 0, "all_bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        counted["all_bytes"] += tensor.nbytes
        if tensor.is_floating_point() and tuple(sorted(tensor.shape)) in shapes:
            counted["weight_bytes"] += tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return counted


def _weight_shapes(model: nn.Module) -> set[tuple[int, ...]]:
    """Of the linear layers that are quantised, either way round."""
    linears = [m for path, m in model.named_modules() if path.rpartition(".")[2] in LINEARS]
    return {tuple(sorted((m.in_features, m.out_features))) for m in linears}
