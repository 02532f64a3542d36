"""Where a base model is found: at the hub, in its cache, in a folder, or in a Python package."""

from __future__ import annotations

import logging
from pathlib import Path

from meta_peft.base.registry_models import REGISTRY_MODELS
from meta_peft.errors import MetaPeftError

logger = logging.getLogger("meta_peft")

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def locate(name: str, revision: str | None = None) -> str:
    """Where `from_pretrained` finds `name`. `REGISTRY_MODELS` come from Python packages where no hub is reachable.

    Raises:
        MetaPeftError: `name` is the path of a folder that there is not, which a hub would be asked for in vain.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        hint = (
            ": ~ stands for your home in a shell alone, write it out" if name.startswith("~") else ": correct the path"
        )
        raise MetaPeftError(f"There is no folder {name!r}{hint}, or give an id of the hub, such as user/name.")
    model = REGISTRY_MODELS.get(name)
    if model is None or revision is not None or _in_hub_cache(name):
        return name
    if model.is_made() or not _hub_reachable():
        return str(model.make())
    return name


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(name, f), str) for f in ("config.json", "model.safetensors"))


def _hub_reachable() -> bool:
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except (OSError, HTTPException):
        logger.info("The hub is not reachable; the model comes from a Python package instead.")
        return False
    return True
