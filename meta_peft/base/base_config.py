"""What the config of a base model says before any of its weights is loaded."""

from __future__ import annotations

from typing import Any

from meta_peft.base.locate import locate
from meta_peft.base.model_kinds import objective_of_config
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.objectives import CLASSIFYING


def base_config(args: ModelArguments) -> Any:
    """The config of the base."""
    from transformers import AutoConfig

    where = locate(args.model_name_or_path, args.model_revision)
    try:
        return AutoConfig.from_pretrained(
            where,
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise MetaPeftError(f"The base model {args.model_name_or_path!r} cannot be loaded: {error}") from error


def objective_of(args: ModelArguments) -> str:
    """The objective that `args` name, or else the one that their base is made for."""
    return args.objective or objective_of_config(base_config(args))


def lacks_classes(args: ModelArguments) -> bool:
    """Whether how many classes its head is to have is said neither by `args` nor by the base."""
    if args.num_labels is not None or args.objective not in CLASSIFYING:
        return False  # where no objective is named it is the base's own, and so is its head
    return objective_of_config(base_config(args)) not in CLASSIFYING
