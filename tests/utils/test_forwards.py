from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from meta_peft.utils.forwards import replaced_forwards


class Doubling(ModelHook):
    """Stands for the hooks by which Accelerate moves inputs between devices."""

    def pre_forward(self, module, *args, **kwargs):
        return tuple(2 * a for a in args), kwargs


@pytest.mark.parametrize("hooked", [False, True])
def test_the_forward_of_the_instance_comes_back(hooked: bool):
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    if hooked:
        add_hook_to_module(layer, Doubling())
    before = layer(x)
    attributes = set(layer.__dict__)
    with replaced_forwards([(layer, lambda x: x + 1)]):
        assert layer(x).tolist() == [[2, 2]]
    with pytest.raises(ZeroDivisionError), replaced_forwards([(layer, lambda x: 1 / 0)]):
        layer(x)
    assert torch.equal(layer(x), before)
    assert set(layer.__dict__) == attributes
