"""Starts that are compared, as they were before their training ended.

A start may be trained for longer than it gets better on new tasks, what is compared at equal compute above all. To be
ahead of that one proves nothing, so it may stop early, as anyone would have it who looks at validation tasks (Prechelt
1998, "Early stopping - but when?", LNCS 1524).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from meta_peft.config import MetaLoraConfig
from meta_peft.evaluation.evaluate import Start
from meta_peft.training.trainer import MetaTrainer

PARTS = {"a quarter of its training": 0.25, "half of its training": 0.5}
"""After which parts of the outer steps that come after a multi-task warm-up it may stop, as tables call them."""


def stops_of(args: MetaLoraConfig) -> dict[int, str]:
    """After which outer steps of a run it may stop, and what that is called; none for a part that is no outer step."""
    first = 0 if args.algorithm == "multitask" else min(args.multitask_warmup_steps, args.max_steps)
    ends = {first + round(part * (args.max_steps - first)): how for how, part in PARTS.items()}
    return {step: how for step, how in ends.items() if first < step < args.max_steps}


def train_with_stops(trainer: MetaTrainer, name: str) -> list[Start]:
    """Train it whole (`MetaTrainer.train_whole`); what it is then called `name`, and what it was after each of `PARTS`.

    All come from one run, whose learning rate goes down to its end: a run that was planned to be shorter may do better.
    """
    looks = _Looks(trainer, name)
    trainer.add_callback(looks)
    trainer.train_whole()
    return [trainer.start(name), *looks.starts]


class _Looks(TrainerCallback):
    """Keeps the start that a trainer holds after some of its outer steps."""

    def __init__(self, trainer: MetaTrainer, name: str):
        self._trainer, self._name = trainer, name
        self._how = stops_of(trainer.args)
        self.starts: list[Start] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._how:
            start, how = self._trainer.start(self._name), self._how[state.global_step]
            self.starts.append(replace(start, how=how, part=PARTS[how]))
