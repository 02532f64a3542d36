from __future__ import annotations

import pytest
from tiny_models import tiny
from torch import nn

from meta_peft.functional.model_modes import evaluation_mode


@pytest.fixture
def model() -> nn.Module:
    """With a module that is there twice, one that is not there, and one that was in evaluation mode before."""
    found = tiny().train()
    found.get_submodule("base_model.model.model.layers.0").again = found.get_submodule("base_model.model.lm_head")
    found.register_module("nothing", None)
    found.get_submodule("base_model.model.model.layers.0.mlp").eval()
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_in_evaluation_mode_and_then_as_it_was(model: nn.Module, fails: bool):
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    with pytest.raises(KeyError) if fails else evaluation_mode(model), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        if fails:
            raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
