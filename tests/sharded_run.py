"""Started in two processes by `test_sharding.py`: each cell of the table on a sharded base, against a whole one.

The last line of standard output of process 0 is JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from heads import model_of, rows_of
from prefixes import PROMPT, with_prompt
from tiny_models import random_batch, tiny_base, with_lora

import meta_peft as mp
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.base import load_base
from meta_peft.frozen.linear import FOUR_BIT
from meta_peft.frozen.whole_weights import is_elsewhere
from meta_peft.params import flatten
from meta_peft.sharding import LockstepPlan, asked_for, refusal, rounds_in_step, shard_base, sharded_bytes
from meta_peft.sharding.table import kind_of
from meta_peft.types import EpisodeBatch

SGD = mp.InnerRule(mp.SGD(), lr=0.1, steps=2, learn_rates=True)
ALGORITHMS = {
    "fomaml": mp.MAML(SGD, first_order=True),
    "reptile": mp.Reptile(mp.InnerRule(mp.SGD(), lr=0.1, steps=2)),
    "multitask": mp.MultiTask(mp.InnerRule(mp.SGD(), lr=0.1, steps=1)),
    "unrolled": mp.MAML(SGD, memory="unrolled"),
    "replay": mp.MAML(SGD, memory="replay"),
    "one graph": mp.MAML(mp.InnerRule(mp.Adam(), lr=0.01, steps=2, learn_rates=True), memory=1),
    "finite differences": mp.MAML(SGD, memory="finite_differences"),
    "slow layers": mp.MAML(replace(SGD, fast=r"layers\.1\."), memory="replay"),  # those below run once
    "imaml": mp.ImplicitMAML(mp.InnerRule(mp.SGD(), lr=0.1, steps=2, proximal=1.0)),
}
NARROW = {"target_modules": ["q_proj", "down_proj"]}  # so that most weights are outside of LoRA layers


def pair(quantisation: str, folder: Path) -> tuple:
    """The same adapter on a whole and on a sharded base."""
    models = []
    for sharded in (False, True):
        if quantisation == "4-bit":
            base = load_base(mp.ModelArguments(str(folder), load_in_4bit=True))
        else:
            base = tiny_base(layers=2, dtype=getattr(torch, quantisation)).requires_grad_(False)
        models.append(with_lora(base, **({} if quantisation == "4-bit" else NARROW)))
        if sharded:
            shard_base(models[-1], asked_for())
    return tuple(models)


def error(found: dict, expected: dict) -> float:
    return max(
        float((found[n] - e).abs().max() / e.abs().max().clamp_min(torch.finfo(e.dtype).tiny))
        for n, e in expected.items()
    )


def left_whole(base: torch.nn.Module) -> int:
    """How many weights that were sharded are whole between uses."""
    known = {torch.nn.Linear, torch.nn.Embedding, FOUR_BIT}
    return sum(type(m) in known and not m.weight.requires_grad and not is_elsewhere(m) for m in base.modules())


def cells(folder: Path) -> dict:
    batch, found = random_batch(2), {}
    for quantisation in ("float64", "float32", "bfloat16", "4-bit"):
        whole, sharded = pair(quantisation, folder)
        here, total = sharded_bytes(sharded)
        algorithms = {}
        for name, algorithm in ALGORITHMS.items():
            if refusal(asked_for().back_end, quantisation, kind_of(algorithm)):
                continue
            at_once = LockstepPlan()
            found_here = flat(mp.meta_gradient(sharded, batch, algorithm, tasks_per_forward=at_once).grads)
            if dist.get_rank():
                continue  # process 0 says what was found, and needs no other for the whole base
            expected = flat(mp.meta_gradient(whole, batch, algorithm, tasks_per_forward=at_once).grads)
            algorithms[name] = {
                "kind": kind_of(algorithm),
                "error": error(found_here, expected),
                "size": float(flatten(expected).abs().max()),
                "left_whole": left_whole(sharded.get_base_model()),
            }
        same = BaseIdentity.of(sharded.get_base_model()) == BaseIdentity.of(whole.get_base_model())
        found[quantisation] = {"here": here, "total": total, "same_identity": same, "algorithms": algorithms}
        del whole, sharded
        gc.collect()
    return found


def heads() -> dict:
    """The meta-gradient of a classifier, each task with a head of its own, on a sharded base and on a whole one."""
    found, algorithm = {}, ALGORITHMS["replay"]
    for case in ("bert", "llama"):
        whole, sharded = (model_of(case) for _ in range(2))
        shard_base(sharded, asked_for())
        batch = EpisodeBatch(rows_of(case, seed=2), rows_of(case, seed=3), ["one", "other"])
        expected, here = (
            flat(mp.meta_gradient(model, batch, algorithm, tasks_per_forward=LockstepPlan()).grads)
            for model in (whole, sharded)
        )
        found[case] = error(here, expected)
    return found


def behind_a_prompt(folder: Path) -> float:
    """Losses of rows behind a prompt that is read once, on a sharded base, against whole rows on a whole one."""
    whole, sharded = (mp.AdapterLoss(model, second_order=False) for model in pair("float64", folder))
    rows = random_batch(2).query
    expected = whole.scores(whole.own(), with_prompt(rows)).loss_T
    with sharded.behind(PROMPT, sharded.own()):
        found = sharded.scores(sharded.own(), rows).loss_T
    return error({"": found}, {"": expected})


def flat(grads: mp.types.Meta) -> dict:
    return {**grads.adapter, **grads.hyper}


def training(folder: Path) -> dict:
    """Two outer steps of an own loop on three tasks, of which process 0 has two and process 1 one."""
    algorithm, rank = ALGORITHMS["replay"], dist.get_rank()
    whole, sharded = pair("float64", folder)
    mine = (0, 2) if rank == 0 else (2, 3)
    plans = {"whole": None, "sharded": LockstepPlan(1)}
    for (name, plan), model in zip(plans.items(), (whole, sharded), strict=True):
        loss_fn = mp.AdapterLoss(model)
        weights = loss_fn.weights.parameters()
        for step in range(2):
            batch = random_batch(3, seed=step)
            if name == "whole":
                total = flatten(mp.meta_gradient(loss_fn, batch, algorithm).grads.adapter)
            else:
                own = batch.part(*mine)
                total = torch.zeros(sum(p.numel() for p in weights.values()) + 1, dtype=torch.float64)
                for task in range(rounds_in_step(own.n_tasks)):
                    weight = float(task < own.n_tasks)  # a task run only to keep step counts for nothing
                    place = min(task, own.n_tasks - 1)
                    gradient = mp.meta_gradient(loss_fn, own.part(place, place + 1), algorithm, tasks_per_forward=plan)
                    total += weight * torch.cat([flatten(gradient.grads.adapter), torch.ones(1)])
                dist.all_reduce(total)
                total = total[:-1] / total[-1]
            with torch.no_grad():
                at = 0
                for parameter in weights.values():
                    parameter -= 0.1 * total[at : at + parameter.numel()].view_as(parameter)
                    at += parameter.numel()
    ends = [dict(mp.AdapterLoss(model).weights.parameters()) for model in (whole, sharded)]
    fresh = dict(mp.AdapterLoss(pair("float64", folder)[0]).weights.parameters())
    result = {"error": error(ends[1], ends[0]), "moved": error(ends[0], fresh)}
    if rank == 0:  # saving needs nothing of the other processes
        sharded.save_pretrained(folder / "adapter")
        result["saved"] = (folder / "adapter" / "adapter_model.safetensors").is_file()
    return result


def main() -> None:
    warnings.simplefilter("ignore")
    sharding = asked_for()
    PartialState()
    assert sharding is not None
    assert sharding.back_end == sys.argv[1]
    assert dist.get_world_size() == 2
    folder = Path(sys.argv[2])  # with a tiny model in it
    result = {"cells": cells(folder), "training": training(folder), "heads": heads()}
    result["prompt"] = behind_a_prompt(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
