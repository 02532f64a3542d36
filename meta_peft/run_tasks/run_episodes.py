"""The episodes of a run, as its options say: how rows are encoded, which tasks are drawn, and which of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meta_peft.base.base_config import lacks_classes
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.objectives import CLASSIFYING
from meta_peft.run_tasks.support import episode_selection
from meta_peft.tasks import Encoding, EpisodeDataset, TaskSet
from meta_peft.tasks.encoding.classes import class_count, class_names, each
from meta_peft.tasks.held_out import held_out
from meta_peft.tasks.labelling import GIVEN
from meta_peft.tasks.prompt import example_columns
from meta_peft.tasks.row_index import ROWS_AT_ONCE
from meta_peft.tasks.written import written


@dataclass(frozen=True)
class RunEpisodes:
    """Makes the datasets of episodes.

    Args:
        model: a `PeftModel`, which some ways of choosing support rows ask.
        encoding: of rows.
        args: the options.
        sharded: whether the base is kept in shards.
    """

    model: Any
    encoding: Encoding
    args: MetaLoraConfig
    sharded: bool

    def training(self, tasks: TaskSet) -> EpisodeDataset:
        """As many episodes as all outer steps take."""
        args = self.args
        length = args.max_steps * args.tasks_in_a_step
        encoded = self._encoded(tasks, length, args.query_size)
        sampling = args.sampling([len(rows) for rows in encoded.rows_of.values()])
        sizes = {"shots": args.shots, "query_size": args.query_size, "seed": args.seed, "length": length}
        return EpisodeDataset(encoded, **sizes, sampling=sampling, **self._drawing())

    def held_out(self, tasks: TaskSet) -> EpisodeDataset:
        """One fixed episode of each task, with as many query rows as its rows and `eval_query_size` allow."""
        args = self.args
        encoded = self._encoded(tasks, len(tasks), args.eval_query_size)
        sizes: dict[str, Any] = {"shots": args.shots, "query_size": args.eval_query_size, "seed": args.held_out_seed}
        return held_out(encoded, **sizes, **self._drawing())

    def _encoded(self, tasks: TaskSet, episodes: int, query_size: int) -> TaskSet:
        args = self.args
        rows_drawn = episodes * (args.shots + query_size) * (args.ways or 1)
        return tasks.encoded(self.encoding, rows_drawn=rows_drawn, num_proc=args.dataset_num_proc)

    def _drawing(self) -> dict[str, Any]:
        # A selection remembers rows by the names of their tasks, so each dataset has one of its own.
        selection = episode_selection(self.model, self.encoding, self.args, sharded=self.sharded)
        return {"labels": self.args.labelling(), "selection": selection}


def run_encoding(
    base: Any, objective: str, args: MetaLoraConfig, processor: Any, task_sets: Sequence[TaskSet]
) -> Encoding:
    """How rows are encoded; names of classes get the same numbers in all tasks if the head has room for all of them.

    Labels that are numbers stand for the same classes throughout, if neither episodes give them other numbers nor the
    head's start is left as it was made.
    """
    encoding = Encoding.of(base, objective, args.prompt_format(), processor, args.max_length)
    if objective not in CLASSIFYING:
        return encoding
    labels = (label for tasks in task_sets for label in labels_of(tasks))
    return encoding.naming(labels, kept=args.label_words == GIVEN and args.learns_head)


def labels_of(tasks: TaskSet) -> Iterator[Any]:
    """The label of each row, tasks not yet encoded."""
    column = example_columns(tasks.dataset.column_names)[-1]
    for part in tasks.dataset.select_columns([column]).with_format("arrow").iter(ROWS_AT_ONCE):
        yield from part[column].to_pylist()


def most_classes(task_sets: Iterable[TaskSet], ways: int | None, label_words: str = GIVEN) -> int:
    """The classes that a head needs for these tasks: the most that one of them has, or an episode takes.

    A number among labels is that of a class; but where `label_words` give classes other numbers in each episode, it is a
    name like any other.

    Raises:
        MetaPeftError: the numbers cannot be meant to be those of classes.
    """
    most = max(2, ways or 0)
    numbers: set[Any] = set()
    for tasks in task_sets:
        labels = list(labels_of(tasks))
        if label_words != GIVEN:
            labels = list(map(written, labels))
        numbers |= {label for label in each(labels) if not isinstance(label, str)}
        for rows in tasks.rows_of.values():
            most = max(most, len(class_names(labels[row] for row in rows)))
    return max(most, class_count(numbers))


def with_classes(
    model_args: ModelArguments, task_sets: Iterable[TaskSet], ways: int | None, label_words: str = GIVEN
) -> ModelArguments:
    """With the number of classes that the tasks need, where neither the options nor the base have one."""
    if not lacks_classes(model_args):
        return model_args
    return replace(model_args, num_labels=most_classes(task_sets, ways, label_words))
