"""Moving a base to the device that it is trained on.

`transformers.Trainer` does that as well, but when losses are bound to the model and learned rates are made beside its
adapter already.
"""

from __future__ import annotations

from typing import Any

import torch


def place(model: Any, device: torch.device, asked: bool | None = None) -> None:
    """Move `model`, a `PeftModel`, to `device`, unless its place was settled when it was loaded.

    It was for a base that bitsandbytes quantised and for one with a device map.

    Args:
        asked: the option `place_model_on_device`; False leaves the model where it is.
    """
    base = model.get_base_model()
    settled = getattr(base, "hf_device_map", None) or getattr(base, "quantization_method", None)
    if asked is not False and not settled:
        model.to(device)
