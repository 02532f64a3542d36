"""What all cells of a comparison share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meta_peft.comparison.compare import CompareArguments
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.frozen.cache import FrozenCache
from meta_peft.tasks import TaskSet

REFERENCE_STEPS = 10


@dataclass(frozen=True)
class Setting:
    """Options, tasks and what is kept between cells."""

    model: ModelArguments
    args: MetaLoraConfig
    comparison: CompareArguments
    tasks: dict[str, TaskSet]
    processor: Any
    shots_curve: tuple[int, ...]
    folder: Path
    frozen: FrozenCache  # of the base, which all cells share
    lengths: Mapping[tuple[str, int | None], int] = field(default_factory=dict)  # see `cells.trained_for`

    @property
    def steps(self) -> list[int]:
        return sorted(set(self.comparison.adaptation_steps))

    @property
    def at(self) -> int:
        """The number of steps that is compared along shots and numbers of training tasks."""
        return REFERENCE_STEPS if REFERENCE_STEPS in self.steps else self.steps[-1]
