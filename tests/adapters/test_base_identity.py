from __future__ import annotations

import pytest
import torch
from surface import base_model, tiny_folder
from tiny_models import tiny_base
from transformers import AutoConfig, AutoModelForImageTextToText

from meta_peft import MetaPeftError, ModelArguments
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.base import load_base


def test_copies_of_a_model_are_the_same_base(caplog: pytest.LogCaptureFixture):
    identities = [BaseIdentity.of(base_model(kind)) for kind in ("dense", "4bit", "8bit")]
    identities.append(BaseIdentity.of(load_base(ModelArguments(str(tiny_folder()), dtype="bfloat16"))))
    for identity in identities:
        identities[0].check(identity)
        identity.check(identities[0])
    assert caplog.text == ""


def test_another_model_is_another_base():
    mine = BaseIdentity.of(base_model())
    message = "load the base model the adapter belongs to"
    with pytest.raises(MetaPeftError, match=message):  # another size
        mine.check(BaseIdentity.of(tiny_base("llama", torch.float32, layers=1, width=64)))
    with pytest.raises(MetaPeftError, match=message):  # the same sizes, other weights
        mine.check(BaseIdentity.of(base_model(folder=tiny_folder(seed=1))))


def test_a_base_that_was_fine_tuned_is_warned_of(caplog: pytest.LogCaptureFixture):
    base = base_model()
    mine, weight = BaseIdentity.of(base), base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    weight.data += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    mine.check(BaseIdentity.of(base))
    assert "If it was fine-tuned since, the adapter may be worse on it" in caplog.text


def test_a_base_that_sees_too_is_known_by_the_part_that_writes():
    """Its sizes stand in a config within the config."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "num_key_value_heads": 2, "head_dim": 8}
    seeing = {**sizes, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=seeing, mm_tokens_per_image=1)
    found = BaseIdentity.of(AutoModelForImageTextToText.from_config(config))
    assert found.sizes == {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
