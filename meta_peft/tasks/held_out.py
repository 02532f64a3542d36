"""The fixed episodes that held-out tasks are judged on, one of each task."""

from __future__ import annotations

from meta_peft.tasks.episodes import EpisodeDataset
from meta_peft.tasks.labelling import Labelling, episodes_of
from meta_peft.tasks.support_selection import SupportSelection
from meta_peft.tasks.task_set import TaskSet
from meta_peft.utils.say_once import say_once
from meta_peft.utils.words import counted


def held_out(
    tasks: TaskSet,
    *,
    shots: int,
    query_size: int | None = None,
    seed: int = 0,
    labels: Labelling | None = None,
    selection: SupportSelection | None = None,
) -> EpisodeDataset:
    """Episode i is of task i, and the same each time; all have as many query rows as the smallest task has to give.

    Args:
        tasks: encoded tasks (see `TaskSet.encoded`).
        shots: support rows of each task, or with `labels` of each class.
        query_size: query rows at most; by default all that the smallest task has.
        labels: how classes are drawn and called, if episodes are of classes.
        selection: chooses the support rows; by default they are random.

    Raises:
        MetaPeftError: a task has no row beyond its support rows.
    """
    size = episodes_of(tasks, labels).query_size(shots, query_size)
    if query_size is not None and size < query_size:
        say_once(
            f"Held-out tasks are judged on {counted(size, 'query row')} each, not on {query_size}: the smallest has"
            f" no more besides {shots} support rows. To have more, leave small tasks out, or lower shots."
        )
    return EpisodeDataset(
        tasks, shots=shots, query_size=size, seed=seed, shuffle=False, labels=labels, selection=selection
    )
