"""Which sharding the launcher asks for, read by Accelerate's own plugins from what `accelerate launch` set.

Accelerate is then not told: it would wrap the whole model, LoRA included, which cannot be meta-trained, and on a CPU it
would drop the request without a word.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

from meta_peft.errors import MetaPeftError

REPLICATED = (
    "Leave it out: by default each process has the whole (quantised) base, and tasks are spread over processes."
)


@dataclass(frozen=True)
class Sharding:
    """Where the frozen base lives.

    Args:
        back_end: "fsdp2" or "zero3".
        offload: shards lie in main memory between uses.
        options: the ``zero_optimization`` part of DeepSpeed's configuration.
    """

    back_end: str
    offload: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def launched_to_shard() -> bool:
    """Whether the launcher asks for any sharding, as long as `asked_for` has not been called."""
    return any(_is_true(os.environ.get(name)) for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


@cache
def asked_for() -> Sharding | None:
    """What the launcher of this process asks for, None for a replicated base. It is read once.

    Raises:
        MetaPeftError: it asks for something that meta-training cannot use; the message names what it can.
    """
    fsdp, deepspeed = _taken("ACCELERATE_USE_FSDP"), _taken("ACCELERATE_USE_DEEPSPEED")
    if fsdp and deepspeed:
        raise MetaPeftError("The launcher asks for FSDP and for DeepSpeed: choose one.")
    if not (fsdp or deepspeed):
        return None
    sharding = _fsdp() if fsdp else _deepspeed()
    if "WORLD_SIZE" not in os.environ:
        raise MetaPeftError(
            f"The launcher asks for {sharding.back_end}, but started a single process that belongs to no group. Start"
            " them with accelerate launch or torchrun, on a CPU with ACCELERATE_USE_CPU=true (see docs/scaling.md)."
        )
    return sharding


def _taken(variable: str) -> bool:
    return _is_true(os.environ.pop(variable, None))


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1", "yes")


def _fsdp() -> Sharding:
    version = int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise MetaPeftError(
            f"fsdp_version={version} is refused: it flattens the weights of several layers into one, frozen and LoRA"
            " alike. Set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does."
        )
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin: Any = FullyShardedDataParallelPlugin()
    if plugin.activation_checkpointing:
        raise MetaPeftError(
            "fsdp_activation_checkpointing would recompute with other LoRA weights than those of the forward: set it to"
            " false, and gradient_checkpointing: true in the options of the run."
        )
    return Sharding("fsdp2", offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy))


def _deepspeed() -> Sharding:
    if find_spec("deepspeed") is None:
        raise MetaPeftError("The launcher asks for DeepSpeed, which is not installed: pip install deepspeed.")
    from accelerate import DeepSpeedPlugin

    plugin: Any = DeepSpeedPlugin()
    if plugin.zero_stage in (0, 1, 2):
        raise MetaPeftError(
            f"ZeRO stage {plugin.zero_stage} is refused: it leaves the base whole in every process and spreads only the"
            f" outer optimizer's state, 8 bytes for each LoRA weight. {REPLICATED} Stage 3 shards the base."
        )
    if plugin.zero3_init_flag:
        raise MetaPeftError(
            "zero3_init_flag would shard norms, biases and LoRA too: set it to false, as"
            " recipes/accelerate/deepspeed_zero3.yaml does. The base is sharded after it is loaded."
        )
    options = dict(plugin.hf_ds_config.config["zero_optimization"])
    device = (options.get("offload_param") or {}).get("device", "none")
    if device == "nvme":
        raise MetaPeftError("offload_param to nvme is not supported: use cpu or none, or a device map with disk.")
    return Sharding("zero3", offload=device == "cpu", options=options)
