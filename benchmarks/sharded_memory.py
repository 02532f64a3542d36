r"""Main memory of each process with a whole and with a sharded base, during a second-order meta-gradient.

    MALLOC_MMAP_THRESHOLD_=262144 ACCELERATE_USE_CPU=true accelerate launch \
        --config_file recipes/accelerate/fsdp2.yaml benchmarks/sharded_memory.py
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import meta_peft as mp
from meta_peft.sharding import LockstepPlan, asked_for, shard_base, sharded_bytes
from meta_peft.types import EpisodeBatch, Rows


def resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def rows(n_tasks: int) -> Rows:
    ids = torch.randint(3, 1000, (n_tasks * 2, 16), generator=torch.Generator().manual_seed(0))
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, n_tasks)


def main() -> None:
    sharding = asked_for()
    PartialState()
    assert sharding is not None
    before = resident()
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=1000, **sizes))
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    whole = resident() - before
    shard_base(model, sharding)
    sharded = resident() - before
    here, total = sharded_bytes(base)
    peaks = {}
    for memory in ("replay", "unrolled"):
        algorithm = mp.MAML(mp.InnerRule(mp.SGD(), lr=0.1, steps=2), memory=memory)
        batch = EpisodeBatch(rows(1), rows(1), ["a"])
        peak = 0

        def watch(*_: object) -> None:
            nonlocal peak
            peak = max(peak, int(psutil.Process().memory_info().rss))

        hooks = [layer.register_forward_hook(watch) for layer in base.model.layers]
        mp.meta_gradient(model, batch, algorithm, tasks_per_forward=LockstepPlan())
        for hook in hooks:
            hook.remove()
        peaks[memory] = peak - before
    print(
        json.dumps(
            {
                "back_end": sharding.back_end,
                "rank": dist.get_rank(),
                "whole_MB": whole // 10**6,
                "sharded_MB": sharded // 10**6,
                "shards_MB": here // 10**6,
                "all_shards_MB": total // 10**6,
                "during_MB": {name: n // 10**6 for name, n in peaks.items()},
                "maxrss_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
            }
        )
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
