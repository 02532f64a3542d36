from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny

from meta_peft.base.placing import place

META = torch.device("meta")


def test_a_base_that_was_loaded_elsewhere_is_moved_with_its_adapter():
    model = tiny()
    place(model, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    place(model, META, asked=False)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    place(model, META)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("settled", "value"),
    [("hf_device_map", {"": "cpu"}), ("quantization_method", SimpleNamespace(value="bitsandbytes"))],
)
def test_one_whose_place_is_settled_stays(settled: str, value: object):
    model = tiny()
    setattr(model.get_base_model(), settled, value)
    place(model, META)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
