"""Which task an episode is of: one rule a file, all of them with the methods of `TaskSampling`."""

from __future__ import annotations

from collections.abc import Sequence

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sampling.by_difficulty import ByDifficulty
from meta_peft.tasks.sampling.by_gradient import ByGradient
from meta_peft.tasks.sampling.by_size import BySize
from meta_peft.tasks.sampling.curriculum import Curriculum
from meta_peft.tasks.sampling.rounds import Rounds
from meta_peft.tasks.sampling.rule import Adaptive, TaskSampling
from meta_peft.utils.checked import at_least, one_of

ADAPTIVE = ("by_difficulty", "by_gradient_diversity", "by_gradient_similarity")
SAMPLINGS = ("uniform", "by_size", *ADAPTIVE, "curriculum")


def task_sampling(
    name: str,
    sizes: Sequence[int],
    *,
    seed: int,
    tasks_per_step: int,
    temperature: float = 2.0,
    exploration: float = 0.2,
    curriculum_steps: int = 1,
) -> TaskSampling:
    """The rule called `name`.

    Args:
        sizes: how many rows each task has.
        tasks_per_step: episodes of an outer step; those of one step are numbered one after the other.
        temperature: of ``by_size``.
        exploration: of the adaptive rules, the share that is spread evenly over all tasks.
        curriculum_steps: after how many outer steps a curriculum has all tasks.
    """
    check_sampling(name, temperature, exploration)
    if name == "by_size":
        return BySize(sizes, seed, temperature)
    if name == "curriculum":
        return Curriculum(len(sizes), tasks_per_step, seed, curriculum_steps)
    if name == "by_difficulty":
        return ByDifficulty(len(sizes), tasks_per_step, seed, exploration)
    if name in ADAPTIVE:
        similar = name == "by_gradient_similarity"
        return ByGradient(len(sizes), tasks_per_step, seed, exploration, similar=similar)
    return Rounds(len(sizes), seed)


def check_sampling(name: str, temperature: float, exploration: float) -> None:
    """Raise unless there is such a rule with such options."""
    one_of("task_sampling", name, SAMPLINGS)
    at_least("sampling_temperature", temperature, 1e-3)
    at_least("sampling_exploration", exploration, 1e-3)
    if exploration > 1:
        raise MetaPeftError(f"sampling_exploration must be at most 1, all of it; got {exploration}.")


__all__ = [
    "ADAPTIVE",
    "SAMPLINGS",
    "Adaptive",
    "ByDifficulty",
    "ByGradient",
    "BySize",
    "Curriculum",
    "Rounds",
    "TaskSampling",
    "check_sampling",
    "task_sampling",
]
