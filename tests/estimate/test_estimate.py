"""Estimates: what is counted without values is what is alive with them."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, base_of
from surface import ROOT
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from meta_peft.base import load_base, lora_config, with_adapter
from meta_peft.base.base_config import base_config
from meta_peft.cli import main
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.estimate import estimate as module
from meta_peft.estimate.estimate import EstimateArguments, base_lines, count_alive, estimate, whole_rows
from meta_peft.estimate.estimate_report import account
from meta_peft.estimate.weightless import weightless_model
from meta_peft.frozen.prefix import DECODERS
from meta_peft.outer_loop.memory_plan import _graph_bytes
from meta_peft.outer_loop.outer_loop import LearnedRates, bind
from meta_peft.processes import StepShares
from meta_peft.types import Meta

GIVEN = EstimateArguments(row_tokens=24, labelled_tokens=5)
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"load_in_4bit": True},
    "nested nf4": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300, tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def options(**changes: Any) -> MetaLoraConfig:
    common = {"shots": 2, "query_size": 3, "per_device_train_batch_size": 2, "inner_steps": 2, "report_to": "none"}
    checkpoint = changes.pop("gradient_checkpointing", False)
    config = MetaLoraConfig(use_cpu=True, **{**common, **changes})
    config.gradient_checkpointing = checkpoint  # transformers calls it by another name from now on, and would warn
    return config


def models(args: ModelArguments) -> tuple[Any, Any]:
    """With values and without."""
    return with_adapter(load_base(args), lora_config(args)), weightless_model(args, base_config(args))


def assert_alive_alike(real: Any, shapes: Any, config: MetaLoraConfig) -> None:
    batch, algorithm = whole_rows(config, GIVEN), config.algorithm_object()
    found, adapter = [], 0
    for model in (real, shapes):
        loss_fn = bind(model, algorithm, checkpoint=config.gradient_checkpointing)
        found.append(count_alive(loss_fn, algorithm, batch)[0].total())
        adapter = sum(p.nbytes for p in loss_fn.weights.parameters().values())
    # What comes back from the shelf is made by no operation of torch if it has values, and so does not count there:
    # fast weights, gradients and two moments of one step, for each of two tasks.
    assert found[0] <= found[1] <= found[0] + 2 * 4 * adapter


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_has_as_many_bytes_as_when_it_is_loaded(folder: str, precision: str):
    real, shapes = models(ModelArguments(folder, **PRECISIONS[precision]))
    assert base_lines(shapes) == base_lines(real)
    assert all(p.device.type == "meta" for p in shapes.parameters())


@pytest.mark.parametrize("asked", [{}, {"load_in_8bit": True, "dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["nf4", "nested nf4", "int8"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_a_base_that_is_stored_quantised_is_counted_as_it_is_loaded(
    folder: str, tmp_path: Path, precision: str, dtype: str, asked: dict[str, Any]
):
    load_base(ModelArguments(folder, **PRECISIONS[precision], dtype=dtype)).save_pretrained(tmp_path)
    args, config = ModelArguments(str(tmp_path), lora_layers=[1, 2], **asked), options(memory="replay")
    real, shapes = models(args)
    assert base_lines(shapes) == base_lines(real)
    assert "base: quantised layers" in [line.what for line in base_lines(shapes)]
    assert_alive_alike(real, shapes, config)


@pytest.mark.parametrize("precision", ["float32", "nf4", "int8"])
@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "unrolled"},
        {"memory": "replay", "inner_optimizer": "sgd"},
        {"memory": "replay", "gradient_checkpointing": True},
        {"memory": "finite_differences"},
        {"algorithm": "fomaml"},
    ],
    ids=str,
)
def test_what_is_alive_without_values_is_what_is_alive_with_them(folder: str, precision: str, changes: dict[str, Any]):
    args, config = ModelArguments(folder, lora_layers=[1, 2], **PRECISIONS[precision]), options(**changes)
    assert_alive_alike(*models(args), config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8"])
def test_the_graph_of_an_inner_step_has_exactly_as_many_bytes(folder: str, precision: str):
    """What autograd saves, counted by hooks."""
    args, config = ModelArguments(folder, **PRECISIONS[precision]), options(memory="replay")
    batch, algorithm = whole_rows(config, GIVEN), config.algorithm_object()
    sizes = []
    for model in models(args):
        loss_fn = bind(model, algorithm)
        adapter = dict(loss_fn.weights.parameters())
        rates = LearnedRates(algorithm.inner, adapter)
        with module.LiveMemory():
            sizes.append(_graph_bytes(loss_fn, Meta(adapter, rates.values()), batch.support, algorithm))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("changes", [{"memory": "unrolled"}, {"algorithm": "fomaml"}], ids=str)
def test_many_layers_follow_from_few(folder: str, changes: dict[str, Any]):
    args, config = ModelArguments(folder, lora_layers=list(range(2, 9))), options(inner_steps=1, **changes)
    shape = base_config(args)
    shape.num_hidden_layers = 9
    settled = module._Settled(config.algorithm_object(), False, whole_rows(config, GIVEN))
    few = module._of_all_layers(args, shape, settled).total()
    whole = max(module._alive(args, shape, settled), key=Counter.total).total()
    assert few == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "n_tasks", "n_rows"),
    [
        ({}, 2, (2, 3)),
        ({"ways": 3}, 2, (6, 9)),
        ({"tasks_per_step": 8}, 8, (2, 3)),
        ({"tasks_per_step": 5, "gradient_accumulation_steps": 2}, 3, (2, 3)),
        ({"gradient_accumulation_steps": 2}, 2, (2, 3)),
        ({"tasks_per_step": 5, "deterministic_reduction": True}, 1, (2, 3)),
    ],
    ids=str,
)
def test_the_batch_is_the_largest_that_a_process_reads(
    folder: str, changes: dict[str, Any], n_tasks: int, n_rows: tuple[int, int]
):
    config = options(memory="replay", inner_steps=1, tasks_per_forward=8, **changes)
    batch = whole_rows(config, GIVEN)
    rows = batch.support, batch.query
    assert batch.n_tasks == n_tasks
    assert tuple(len(r.labels_BL) // n_tasks for r in rows) == n_rows
    shares: Any = StepShares(
        range(config.tasks_in_a_step),  # type: ignore[arg-type]
        len,  # type: ignore[arg-type]
        tasks_per_step=config.tasks_in_a_step,
        turns=config.gradient_accumulation_steps,
        one_by_one=config.deterministic_reduction,
    )
    assert max(size for share in shares for size in share.batches) == n_tasks
    text = account(ModelArguments(folder), config, replace(GIVEN, alternatives=False))
    assert text.splitlines()[0].endswith(f", {n_tasks} of {n_tasks} tasks at once")


def test_gradients_that_wait_for_their_turn(folder: str):
    """With deterministic_reduction each task's is kept until the step ends, the last one's no longer than it is made."""

    def waiting(**changes: Any) -> int:
        found = estimate(ModelArguments(folder), options(inner_steps=1, **changes), GIVEN)
        return sum(line.n_bytes for line in found.resting if line.what.startswith("outer gradient"))

    one = waiting(gradient_accumulation_steps=2)
    assert one > 0
    assert waiting(tasks_per_step=7, gradient_accumulation_steps=2) == one
    assert waiting(tasks_per_step=8, gradient_accumulation_steps=2, deterministic_reduction=True) == 7 * one
    assert waiting(tasks_per_step=8, deterministic_reduction=True) == 7 * one
    assert waiting(tasks_per_step=1, deterministic_reduction=True) == 0


def test_auto_plans_for_the_device(folder: str):
    args, config = ModelArguments(folder), options()
    roomy, narrow = (estimate(args, config, replace(GIVEN, device_gb=gb)) for gb in (80.0, 1.003))
    assert roomy.tasks == 2
    assert narrow.total < roomy.total


def test_the_command_says_where_the_memory_goes(
    folder: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    words = ["--model_name_or_path", folder, "--row_tokens", "24", "--device_gb", "4", "--inner_steps", "1"]
    assert main(["inspect", "--estimate", *words, "--use_cpu"]) == 0
    text = capsys.readouterr().out
    for part in ("all the time", "base: embeddings", "at the fullest moment", "in all", "fits into 4 GB", "unrolled"):
        assert part in text
    assert "at once" not in caplog.text, "it stands in the table"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"row_tokens": 0}, "row_tokens must be 1 or more; got 0"),
        ({"row_tokens": 8}, "A row of 8 tokens cannot have 8 labelled ones"),
        ({"device_gb": -1.0}, "device_gb must be positive; got -1.0"),
    ],
)
def test_impossible_questions(values: dict[str, Any], message: str):
    with pytest.raises(MetaPeftError, match=message):
        EstimateArguments(**values)


@pytest.mark.parametrize("changes", [{"max_length": 6}, {}], ids=str)
def test_more_labels_than_the_tokens_of_a_row_that_is_as_long_as_may_be(folder: str, changes: dict[str, Any]):
    config = options(**changes)
    given = EstimateArguments(labelled_tokens=300)
    with pytest.raises(MetaPeftError, match=f"A row of {config.max_length} tokens cannot have 300 labelled ones"):
        estimate(ModelArguments(folder), config, given)


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SEES = {"text_config": {"model_type": "llama", **TINY}}
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("mixtral", TINY, r"\(mixtral\) is a mixture of experts"),
        ("qwen3_moe", TINY, r"\(qwen3_moe\) is a mixture of experts"),
        ("llava", SEES, r"\(llava\) is made of several models"),
        ("gemma3", {}, r"\(gemma3\) is made of several models"),
        ("vit", TINY, r"\(vit\) is none of those of transformers"),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}, r"\(mamba\) has other layers"),
        ("falcon_h1", {**TINY, "num_key_value_heads": 1}, r"\(falcon_h1\) has other layers"),
        ("bert", {**TINY, "architectures": ["BertForMaskedLM"]}, "has the objective masked_lm.*max_steps: 1"),
        ("llama", {**TINY, **QUANTISED}, "quantised with gptq; only bitsandbytes 4-bit and 8-bit are supported"),
    ],
)
def test_models_that_are_not_estimated(tmp_path: Path, kind: str, sizes: dict[str, Any], message: str, dtype: str):
    AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    with pytest.raises(MetaPeftError, match=message):
        estimate(ModelArguments(str(tmp_path), dtype=dtype), options(), GIVEN)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", DECODERS)
def test_every_dense_decoder_is_counted_without_values_as_with_them(tmp_path: Path, kind: str):
    how = ARCHITECTURES[kind]
    base = base_of(kind, dtype=torch.float32)
    base.save_pretrained(tmp_path)
    args = ModelArguments(str(tmp_path), lora_target_modules=list(how.targets))
    assert_alive_alike(*models(args), options(memory="replay"))


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(MetaPeftError, match=r"The base model .* cannot be loaded"):
        base_config(ModelArguments(str(tmp_path)))


def documented() -> list[tuple[str, str]]:
    """Each command of the page with the output that stands below it."""
    page = (ROOT / "docs" / "large_models.md").read_text(encoding="utf-8")
    return re.findall(r"```bash\n(meta-peft inspect.*?)```\n+```text\n(.*?)```", page, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("command", "output"), documented(), ids=lambda words: None)
def test_the_page_shows_what_the_command_says(
    command: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert capsys.readouterr().out == output


PATHS = "model.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize(
    "targets",
    [["all-linear"], ["q_proj", "embed_tokens"], [PATHS.format(5)], [PATHS.format(i) for i in range(6)]],
    ids=["all-linear", "outside of the layers", "one path", "paths"],
)
def test_the_estimate_of_many_layers_is_that_of_all_of_them_whatever_the_targets(
    tmp_path: Path, targets: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Models of fewer layers stand in for it, and have not all targets that it has."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300)).save_pretrained(tmp_path)
    found = []
    for few in ((2, 3), (99, 100)):
        monkeypatch.setattr(module, "FEW", few)
        found.append(estimate(ModelArguments(str(tmp_path), lora_target_modules=targets), options(), GIVEN).at_work)
    assert found[0] == pytest.approx(found[1], rel=0.01)
