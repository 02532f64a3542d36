"""``meta-peft train``: the main job."""

from __future__ import annotations

from collections.abc import Sequence

from meta_peft.allocator import keep_freed_memory


def run(words: Sequence[str]) -> int:
    """The main job, by config file and options."""
    from meta_peft.compare import CompareArguments
    from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
    from meta_peft.config_file import parse
    from meta_peft.main_job import run as main_job
    from meta_peft.processes import group
    from meta_peft.sharding.asked import launched_to_shard

    groups = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments)
    if not launched_to_shard():  # gathered weights that stay in the heap would be more than a whole base
        keep_freed_memory()
    try:
        main_job(*parse(groups, words, prog="meta-peft train", about="Meta-train a LoRA adapter and compare it."))
    finally:
        group.leave()
    return 0
