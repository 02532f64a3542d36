"""Estimates: what is counted without values is what is alive with them."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from surface import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from meta_peft.base import load_base, lora_config, with_adapter
from meta_peft.base.base_config import base_config
from meta_peft.cli import main
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.estimate import estimate as module
from meta_peft.estimate.estimate import EstimateArguments, base_lines, count_alive, estimate, whole_rows
from meta_peft.estimate.weightless import weightless_model
from meta_peft.outer_loop.memory_plan import _graph_bytes
from meta_peft.outer_loop.outer_loop import LearnedRates, bind
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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_has_as_many_bytes_as_when_it_is_loaded(folder: str, precision: str):
    real, shapes = models(ModelArguments(folder, **PRECISIONS[precision]))
    assert base_lines(shapes) == base_lines(real)
    assert all(p.device.type == "meta" for p in shapes.parameters())


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
    batch, algorithm = whole_rows(config, GIVEN), config.algorithm_object()
    found, adapter = [], 0
    for model in models(args):
        loss_fn = bind(model, algorithm, checkpoint=config.gradient_checkpointing)
        found.append(count_alive(loss_fn, algorithm, batch)[0].total())
        adapter = sum(p.nbytes for p in loss_fn.weights.parameters().values())
    # What comes back from the shelf is made by no operation of torch if it has values, and so does not count there:
    # fast weights, gradients and two moments of one step, for each of two tasks.
    assert found[0] <= found[1] <= found[0] + 2 * 4 * adapter


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
