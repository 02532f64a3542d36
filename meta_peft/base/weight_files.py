"""Which weights a base is loaded with, known before they are: two under one name are two bases."""

from __future__ import annotations

from pathlib import Path

from meta_peft.base.base_config import base_config
from meta_peft.base.locate import locate
from meta_peft.config import ModelArguments
from meta_peft.utils.digests import of_sample, of_texts

NAMES = ("model*.safetensors", "pytorch_model*.bin")


def weights_digest(args: ModelArguments) -> str:
    """A digest of the base's weights: of the hub's commit, or of a sample of the files in its folder."""
    folder = Path(locate(args.model_name_or_path, args.model_revision))
    if folder.is_dir():
        files = sorted(file for name in NAMES for file in folder.glob(name))
        return of_texts(*(part for file in files for part in (file.name, of_sample(file))))
    return of_texts(str(getattr(base_config(args), "_commit_hash", None)))
