"""The frozen base in shards, on real FSDP2, real DeepSpeed and real offloading: equal to a base that is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sharded_run import ALGORITHMS, error, flat
from surface import ROOT, environment, tiny_folder
from tiny_models import random_batch, randomise, tiny_base, with_lora

import meta_peft as mp
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.base import load_base, with_adapter
from meta_peft.errors import MetaPeftError
from meta_peft.sharding import (
    LockstepPlan,
    Sharding,
    asked_for,
    check_even,
    check_sharding,
    refusal,
    rounds_in_step,
    shard_base,
)
from meta_peft.sharding.asked import launched_to_shard
from meta_peft.sharding.table import ALGORITHMS as KINDS
from meta_peft.sharding.table import BACK_ENDS, QUANTISATIONS, kind_of, markdown

RECIPES = {"fsdp2": "fsdp2.yaml", "zero3": "deepspeed_zero3.yaml"}
no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
back_ends = pytest.mark.parametrize(
    "back_end", ["fsdp2", pytest.param("zero3", marks=[pytest.mark.deepspeed, no_deepspeed])]
)


@cache
def two_processes(back_end: str) -> dict:
    """What `sharded_run.py` finds, started once with the configuration that is shipped."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / RECIPES[back_end])]
    command += [str(ROOT / "tests" / "sharded_run.py"), back_end, str(tiny_folder())]
    device = {"fsdp2": {"ACCELERATE_USE_CPU": "true"}, "zero3": {"DS_ACCELERATOR": "cpu"}}[back_end]
    done = subprocess.run(
        command, env=environment(**device), capture_output=True, text=True, check=False, timeout=400, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.launch
@back_ends
def test_heads_of_classifiers_stay_whole(back_end: str):
    errors = two_processes(back_end)["heads"]
    assert set(errors) == {"bert", "llama"}
    assert max(errors.values()) < 1e-10


@pytest.mark.launch
@back_ends
def test_a_prompt_is_read_once_by_a_base_in_shards_too(back_end: str):
    assert two_processes(back_end)["prompt"] < 1e-10


@pytest.mark.launch
@back_ends
def test_meta_gradients_are_those_of_a_whole_base(back_end: str):
    cells = two_processes(back_end)["cells"]
    for quantisation, cell in cells.items():
        computed = {run["kind"] for run in cell["algorithms"].values()}
        assert computed == {kind for kind in KINDS if not refusal(back_end, quantisation, kind)}
        for name, run in cell["algorithms"].items():
            assert run["size"] > 1e-3, (quantisation, name)
            assert run["error"] < (1e-10 if quantisation == "float64" else 1e-5), (quantisation, name)
    assert set(cells) >= {q for q in QUANTISATIONS if not refusal(back_end, q, "second order")}


@pytest.mark.launch
@back_ends
def test_each_process_holds_half_of_the_weights(back_end: str):
    for quantisation, cell in two_processes(back_end)["cells"].items():
        assert cell["total"] > 8000
        assert cell["here"] == pytest.approx(cell["total"] / 2, rel=0.01), quantisation
        assert cell["same_identity"]
        assert not any(run["left_whole"] for run in cell["algorithms"].values())


@pytest.mark.launch
@back_ends
def test_a_loop_with_uneven_tasks_ends_where_one_process_does(back_end: str):
    training = two_processes(back_end)["training"]
    assert training["moved"] > 1e-3
    assert training["error"] < 1e-10
    assert training["saved"]


# ---- one process, part of the base in main memory or on disk


@pytest.fixture(scope="module")
def device_map(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("offload")
    tiny_base("llama", torch.float32, layers=3, width=16).save_pretrained(folder)
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.2": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    (folder / "map.json").write_text(json.dumps(places))
    return str(folder), str(folder / "map.json"), str(folder / "offload")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_on_disk_give_the_same_meta_gradients(dtype: str, device_map: tuple[str, str, str]):
    folder, places, offload = device_map
    bases = (
        load_base(mp.ModelArguments(folder, dtype=dtype)),
        load_base(mp.ModelArguments(folder, dtype=dtype, device_map=places, offload_folder=offload)),
    )
    assert [base.model.layers[2].mlp.up_proj.weight.is_meta for base in bases] == [False, True]
    assert BaseIdentity.of(bases[0]) == BaseIdentity.of(bases[1])
    here, offloaded = (with_adapter(b, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])) for b in bases)
    for model in (here, offloaded):
        started = dict(mp.AdapterLoss(model).weights.parameters())
        assert all(value.abs().max() > 0 for name, value in started.items() if "lora_A" in name)
        randomise(model)
    computed = set()
    for name, algorithm in ALGORITHMS.items():
        if refusal("device_map", dtype, kind_of(algorithm)):
            continue
        expected, found = (flat(mp.meta_gradient(m, random_batch(2), algorithm).grads) for m in (here, offloaded))
        assert error(found, expected) < 1e-5, name
        computed.add(kind_of(algorithm))
    assert computed == {kind for kind in KINDS if not refusal("device_map", dtype, kind)}
    assert offloaded.get_base_model().model.layers[2].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize(
    ("places", "options", "message"),
    [
        ({"model": 0, "lm_head": 1}, {}, "the weights of one adapter have to lie on one device"),
        ({"": "cpu"}, {"load_in_4bit": True}, "bitsandbytes leaves layers that are offloaded dense"),
        ({"": "disk"}, {"load_in_8bit": True}, "use FSDP2 and 4 bits"),
    ],
)
def test_device_maps_that_cannot_work_are_refused(tmp_path: Path, places: dict, options: dict, message: str):
    (tmp_path / "map.json").write_text(json.dumps(places))
    with pytest.raises(MetaPeftError, match=message):
        load_base(mp.ModelArguments(str(tiny_folder()), device_map=str(tmp_path / "map.json"), **options))


# ---- what the launcher asks for


def asked(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Sharding | None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    return asked_for.__wrapped__()


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}


def test_the_launcher_is_read_once_and_accelerate_is_not_told(monkeypatch: pytest.MonkeyPatch):
    assert asked(monkeypatch) is None
    assert not launched_to_shard()
    assert asked(monkeypatch, **FSDP2) == Sharding("fsdp2")
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert not launched_to_shard()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launched_to_shard()
    assert asked(monkeypatch, **FSDP2, FSDP_OFFLOAD_PARAMS="true") == Sharding("fsdp2", offload=True)


@pytest.mark.deepspeed
@no_deepspeed
def test_zero3_is_read_with_its_options(monkeypatch: pytest.MonkeyPatch):
    sharding = asked(monkeypatch, **DEEPSPEED, ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    assert sharding is not None
    assert (sharding.back_end, sharding.offload, sharding.options["stage"]) == ("zero3", False, 3)
    cpu = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    offloaded = asked(monkeypatch, **DEEPSPEED, **cpu)
    assert offloaded is not None
    assert offloaded.offload


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version=1 is refused"),
        ({**FSDP2, **DEEPSPEED}, "choose one"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing: true"),
        *(
            pytest.param(*case, marks=[pytest.mark.deepspeed, no_deepspeed])
            for case in (
                ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "by default each process has the whole"),
                ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "Stage 3 shards the base"),
                (
                    {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
                    "zero3_init_flag would shard norms",
                ),
            )
        ),
    ],
)
def test_what_the_launcher_must_not_ask_for(monkeypatch: pytest.MonkeyPatch, variables: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        asked(monkeypatch, **variables)


def test_a_lone_process_cannot_shard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(MetaPeftError, match="a single process that belongs to no group"):
        asked_for.__wrapped__()


# ---- what is refused before anything is computed


@pytest.mark.parametrize(
    ("back_end", "quantisation", "name", "message"),
    [
        ("fsdp2", "8-bit", "fomaml", "integer codes do not shard: use 4 bits"),
        ("zero3", "8-bit", "unrolled", "keeps a full copy of the codes"),
        ("fsdp2", "bfloat16", "finite differences", "use memory='replay'"),
        ("device_map", "4-bit", "imaml", "use FSDP2"),
    ],
)
def test_what_cannot_work_is_refused_without_a_model(back_end: str, quantisation: str, name: str, message: str):
    with pytest.raises(MetaPeftError, match=message):
        check_sharding(back_end, quantisation, ALGORITHMS[name])
    check_sharding(back_end, "float32", ALGORITHMS[name])


def test_an_8_bit_base_and_codes_of_integers_do_not_shard(quantised_base):
    with pytest.raises(MetaPeftError, match="An 8-bit base does not shard"):
        shard_base(with_lora(quantised_base("int8")), Sharding("fsdp2"))
    with pytest.raises(MetaPeftError, match=r"14 weights are stored as torch\.uint8"):
        shard_base(with_lora(quantised_base("nf4")), Sharding("fsdp2"))


def test_a_base_that_is_not_frozen_and_a_process_without_a_group_do_not_shard():
    with pytest.raises(MetaPeftError, match="freeze the base first"):
        shard_base(tiny_base(), Sharding("fsdp2"))
    with pytest.raises(MetaPeftError, match="There is no process group"):
        shard_base(tiny_base().requires_grad_(False), Sharding("fsdp2"))


def test_memory_that_runs_out_in_one_process_is_an_error():
    with pytest.raises(MetaPeftError, match="set tasks_per_forward below 4"):
        LockstepPlan().shrink(4)
    assert rounds_in_step(3) == 3  # alone, as many as there are


def test_uneven_shares_are_refused():
    check_even(8, 4)
    with pytest.raises(MetaPeftError, match="take 12 tasks per step"):
        check_even(9, 4)


def test_the_page_has_the_table_of_the_code():
    assert markdown() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert markdown().count("\n| ") == len(BACK_ENDS) * len(QUANTISATIONS) + 1


def test_a_weight_shared_with_an_unknown_layer_stays_whole():
    from meta_peft.sharding.shard import _frozen_weights

    base = tiny_base(tie_word_embeddings=True).requires_grad_(False)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    weights = _frozen_weights(base)
    assert sum(weight is base.lm_head.weight for weight in weights) == 1

    class Scaled(torch.nn.Embedding):
        pass

    base.model.embed_tokens.__class__ = Scaled
    assert not any(weight is base.lm_head.weight for weight in _frozen_weights(base))
