"""What a run needs besides the adapter to go on where it stopped: optimizer, schedule, random numbers, memory plan.

Two files, ``state.safetensors`` and ``state.json``. Nothing is pickled, so a checkpoint from elsewhere can run no code.
JSON keeps every bit of a float.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meta_peft.errors import MetaPeftError

TENSORS, JSON = "state.safetensors", "state.json"


def save(folder: Path, values: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers, texts and None. Keys of dicts may be whole numbers."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(values, "", tensors), indent=1) + "\n"
    save_file(tensors, folder / TENSORS)
    (folder / JSON).write_text(text, encoding="utf-8")


def load(folder: Path) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        MetaPeftError: the files are missing or cannot be read.
    """
    try:
        tensors = load_file(folder / TENSORS)
        values: dict[str, Any] = _restored(json.loads((folder / JSON).read_text(encoding="utf-8")), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MetaPeftError(
            f"{folder} has no training state that can be read ({error!r}): it is an adapter to start from, not a checkpoint"
            " to resume."
        ) from error
    return values


def is_in(folder: Path) -> bool:
    """Whether a checkpoint has a training state, which one of `save_only_model` has not."""
    return (folder / JSON).is_file()


def started(folder: Path) -> float:
    """When the run of a checkpoint began, in seconds since 1970; 0 where it does not say."""
    try:
        return float(dict(json.loads((folder / JSON).read_text(encoding="utf-8"))["dict"])["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def random_numbers() -> dict[str, Any]:
    """The state of every generator that a process draws from."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_numbers(state: dict[str, Any]) -> None:
    """Go on drawing where `random_numbers` was called."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---- to and from JSON: a tensor is {"tensor": its name in the other file}, a dict {"dict": [[key, value], ...]}


def _plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _plain(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise MetaPeftError(f"The training state has a {type(value).__name__} at {path}, which a checkpoint cannot hold.")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _restored(item, tensors) for key, item in value["dict"]}
    return value
