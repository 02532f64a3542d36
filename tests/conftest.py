"""Fixtures, and the order of the tests.

Nothing that takes long is imported before a fixture runs: the process that hands out the tests runs none.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that asked the hub would wait for it
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="meta_peft_test_cache_")  # read when datasets is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with two threads each would wait for each other on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

TESTS = Path(__file__).parent
LONGEST = (  # files, in the order of what they take; the first ones first, so that none is left to one process at the end
    "processes/test_updates.py",
    "estimate/test_estimate.py",
    "test_recipes.py",
    "adapters/test_push.py",
    "processes/test_survival.py",
    "protocol/test_run.py",
    "test_docs.py",
    "test_notebooks.py",
    "test_benchmarks.py",
    "test_sharding.py",
    "processes/test_trouble.py",
    "test_real.py",
    "training/test_tracking.py",
    "adaptation/test_adapt.py",
    "adapters/test_hub.py",
)


def pytest_collection_finish() -> None:
    gc.freeze()  # all that was imported: Accelerate collects garbage at the end of each training, half a second of it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {TESTS / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quantised_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    """Load a tiny Llama in nf4 or int8, the way a user does: ``from_pretrained(folder, quantization_config=...)``."""
    import torch
    from tiny_models import tiny_base
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from meta_peft.frozen.linear import quantised_layers

    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama", torch.float32, layers=2, width=64).save_pretrained(folder)

    def load(kind: str) -> PreTrainedModel:
        config = {
            "nf4": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
        }[kind]
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        assert len(quantised_layers(model)) == 14  # a device map with cpu entries can quietly load a dense model
        return model

    return load


@pytest.fixture
def model_of(quantised_base: Callable[[str], PreTrainedModel]) -> Callable[[str], PeftModel]:
    """A PEFT model by name: "llama" and "gpt2" are float64, "float32" a dense Llama, "nf4" and "int8" quantised."""
    import torch
    from tiny_models import QUANTISED, tiny, with_lora

    def make(name: str) -> PeftModel:
        if name in QUANTISED:
            return with_lora(quantised_base(name))
        if name == "float32":
            return tiny("llama", torch.float32, layers=2)
        return tiny(name, layers=2)

    return make
