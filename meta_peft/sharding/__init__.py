"""Bases too large for one device: the frozen base in shards over processes, LoRA whole in each."""

from meta_peft.sharding.asked import Sharding, asked_for
from meta_peft.sharding.lockstep import LockstepPlan, check_even, rounds_in_step
from meta_peft.sharding.shard import shard_as_asked, shard_base, sharded_bytes
from meta_peft.sharding.table import check_sharding, refusal

__all__ = [
    "LockstepPlan",
    "Sharding",
    "asked_for",
    "check_even",
    "check_sharding",
    "refusal",
    "rounds_in_step",
    "shard_as_asked",
    "shard_base",
    "sharded_bytes",
]
