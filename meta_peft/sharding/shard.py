"""Shard the frozen weights of a base; LoRA, heads, norms, biases and scales of 4-bit weights stay whole in each process.

What is sharded are the weights of layers whose formula is known by their class, because `fast_forwards` computes with
those through `whole_weight`, which gathers them at the moment of use. So no graph holds a gathered weight, second
derivatives are those of a whole base, and at most one layer is whole at a time.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from meta_peft.errors import MetaPeftError
from meta_peft.frozen.linear import EIGHT_BIT, FOUR_BIT
from meta_peft.frozen.prefix import layers_of
from meta_peft.frozen.whole_weights import is_elsewhere
from meta_peft.sharding.asked import Sharding, asked_for
from meta_peft.sharding.lockstep import check_even
from meta_peft.sharding.table import check_sharding

KNOWN = (nn.Linear, Conv1D, nn.Embedding, FOUR_BIT)


def shard_as_asked(model: Any, algorithm: Any, *, tasks_per_step: int, shares: int) -> bool:
    """Shard the base of `model` if the launcher asks for it and it is whole; whether the launcher asks.

    Args:
        model, algorithm: what is trained, and how.
        tasks_per_step, shares: see `check_even`.

    Raises:
        MetaPeftError: these do not work together, or the tasks do not come to equally many everywhere.
    """
    sharding = asked_for()
    if sharding is None:
        return False
    base = model.get_base_model()
    kinds = {"4-bit": getattr(base, "is_loaded_in_4bit", False), "8-bit": getattr(base, "is_loaded_in_8bit", False)}
    stored = next((kind for kind, so in kinds.items() if so), str(base.dtype).removeprefix("torch."))
    check_sharding(sharding.back_end, stored, algorithm)
    check_even(tasks_per_step, shares)
    if not any(is_elsewhere(module) for module in base.modules()):
        shard_base(model, sharding)
    return True


def shard_base(model: Any, sharding: Sharding) -> None:
    """Shard the base of `model`, a `transformers` model or a `PeftModel` of one, in place. All processes call it.

    With FSDP2 and 4 bits, LoRA has to be there already: PEFT finds no quantisation on a weight in shards.

    Raises:
        MetaPeftError: there is nothing that could be sharded, or what there is would stay whole without a word.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(is_elsewhere(module) for module in base.modules()):
        raise MetaPeftError("The base is sharded or offloaded already: shard a base that is whole.")
    weights = _frozen_weights(base)
    _check_group(weights, sharding)
    if sharding.back_end == "fsdp2":
        _fsdp2(base, weights, offload=sharding.offload)
    else:
        _zero3(weights, sharding)


def sharded_bytes(base: nn.Module) -> tuple[int, int]:
    """Bytes of the sharded weights that lie in this process, and of those weights in all processes together."""
    here = total = 0
    for weight in base.parameters():
        tensor: Any = weight
        if isinstance(tensor, DTensor):
            here += tensor.to_local().nbytes
            total += tensor.numel() * tensor.element_size()
        elif hasattr(tensor, "ds_id"):
            here += tensor.ds_tensor.nbytes
            total += tensor.ds_numel * tensor.element_size()
    return here, total


def _frozen_weights(base: nn.Module) -> list[nn.Parameter]:
    """Each once, those that other modules share with an unknown layer left out."""
    known: dict[int, nn.Parameter] = {}
    unknown: set[int] = set()
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if type(module) in KNOWN and name == "weight" and not parameter.requires_grad:
                known[id(parameter)] = parameter
            else:
                unknown.add(id(parameter))
    weights = [weight for i, weight in known.items() if i not in unknown]
    if any(isinstance(module, EIGHT_BIT) for module in base.modules()):
        raise MetaPeftError("An 8-bit base does not shard: load it in 4 bits, or in bfloat16 or float32.")
    if not weights:
        raise MetaPeftError("The model has no frozen linear layer or embedding to shard: freeze the base first.")
    return weights


def _check_group(weights: list[nn.Parameter], sharding: Sharding) -> None:
    whole = [weight for weight in weights if not weight.is_floating_point()]
    if whole and sharding.back_end == "fsdp2":
        raise MetaPeftError(
            f"{len(whole)} weights are stored as {whole[0].dtype}, which FSDP2 leaves whole without a word: load the base"
            " with bnb_4bit_quant_storage set to the dtype of the base."
        )
    if not dist.is_initialized():
        raise MetaPeftError(
            "There is no process group to shard over: make accelerate.PartialState() first, in processes that"
            " accelerate launch or torchrun started, on a CPU with ACCELERATE_USE_CPU=true."
        )


def _fsdp2(base: Any, weights: list[nn.Parameter], *, offload: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    device = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
    chosen = {id(weight) for weight in weights}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
        "ignored_params": {p for p in base.parameters() if id(p) not in chosen},
        "reshard_after_forward": True,
    }
    if offload and device == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    # FSDP2 warns that its hook on the logits is lost if they are changed in place. Products do not depend on its hooks.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for layer in layers_of(base):
        fully_shard(layer, **options)
    fully_shard(base, **options)


def _zero3(weights: list[nn.Parameter], sharding: Sharding) -> None:
    import deepspeed
    from deepspeed.runtime.zero import Init

    deepspeed.init_distributed(dist.get_backend())  # DeepSpeed's view of the group that there is
    zero: dict[str, Any] = {**sharding.options, "stage": 3, "memory_efficient_linear": False}
    if not sharding.offload:
        zero.pop("offload_param", None)
    zero.pop("offload_optimizer", None)  # the outer optimizer is ours
    Init(
        module=nn.ParameterList(weights),
        mem_efficient_linear=False,  # which would replace F.linear in the whole process
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
    )
