"""One cell: train the start if it is one that is trained, choose its rates, and run its curves."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.base_model import new_model
from meta_peft.compare import CompareArguments, first_tasks, held_out_episodes, start_curve
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.equal_compute import at_equal_compute
from meta_peft.evaluate import Curve, Start, curve
from meta_peft.frozen_cache import FrozenCache
from meta_peft.in_context import in_context_scores
from meta_peft.inner_loop import adapt
from meta_peft.protocol.arguments import DEFAULTS, IN_CONTEXT, META, MULTITASK, PLAIN, REPTILE, TITLES
from meta_peft.protocol.cells import Cell, Found
from meta_peft.run_episodes import RunEpisodes
from meta_peft.scoring import Scores
from meta_peft.tasks import TaskSet
from meta_peft.tasks.collate import row_length
from meta_peft.trainer import MetaTrainer
from meta_peft.types import Episode

REFERENCE_STEPS = 10
# What `LoraConfig` and PEFT's quick tour have: LoRA of rank 8 where PEFT puts it in a model of this kind, Adam at 1e-3.
PEFT_LORA: dict[str, Any] = {
    **{"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    **{"lora_target_modules": None, "lora_layers": None},
}
PEFT_RULE: dict[str, Any] = {
    "inner_optimizer": "adam",
    "inner_lr": 1e-3,
    "inner_weight_decay": 0.0,
    "fast_weights": None,
}


@dataclass(frozen=True)
class Setting:
    """What all cells of a comparison share."""

    model: ModelArguments
    args: MetaLoraConfig
    comparison: CompareArguments
    tasks: dict[str, TaskSet]
    processor: Any
    shots_curve: tuple[int, ...]
    folder: Path
    frozen: FrozenCache  # of the base, which all cells share

    @property
    def steps(self) -> list[int]:
        return sorted(set(self.comparison.adaptation_steps))

    @property
    def at(self) -> int:
        """The number of steps that is compared along shots and numbers of training tasks."""
        return REFERENCE_STEPS if REFERENCE_STEPS in self.steps else self.steps[-1]


def measured(cell: Cell, setting: Setting, options: str) -> Found:
    """What is found in a cell. Its adapter, if it is trained, is saved in the folder ``starts``."""
    trainer, cost = _trained(cell, setting)
    validation = held_out_episodes(trainer, setting.tasks["validation"], setting.comparison.max_validation_tasks)
    test = held_out_episodes(trainer, setting.tasks["test"], setting.comparison.max_test_tasks)
    more = {n: _with_shots(trainer, setting, test, n) for n in setting.shots_curve if n != trainer.args.shots}
    common: dict[str, Any] = {"cell": cell, "metric": trainer.scorer.metric.name, "tasks": [e.task for e in test]}
    common |= {"at": setting.at, "options": options}
    cost["support_tokens"] = float(np.mean([sum(map(row_length, e.support)) for e in test]))
    if cell.start == IN_CONTEXT:
        scores = _in_context(trainer, test)
        shots = {str(n): _values(_in_context(trainer, episodes)) for n, episodes in more.items()}
        rows = {"loss": scores.loss[:, None].tolist(), "score": scores.score[:, None].tolist()}
        counts = [scores.calibration.sum(0).tolist()]
        return Found(**common, **rows, steps=[0], factors=[None], calibration=counts, shots=shots, cost=cost)

    start = trainer.start(TITLES[cell.start])
    batches = trainer.batches(test)
    starts = [start, *_by_other_rules(cell, trainer)]
    factors = setting.comparison.rate_factors
    found = start_curve(trainer, start, trainer.batches(validation), batches, setting.steps, factors, *starts[1:])
    if cell.trained:
        chosen = zip(found.steps, found.factors, strict=True)
        trainer.record(rate_factors={k: f for k, f in chosen if f is not None})
        trainer.save_model()
    column = found.steps.index(setting.at)
    factor = found.factors[column]
    start = next(s for s in starts if s.how == found.how[column])
    assert factor is not None, "start_curve chooses one for each number of steps"
    shots = {str(n): _after(trainer, start, episodes, setting.at, factor) for n, episodes in more.items()}
    cost["seconds_per_step"] = _seconds_per_step(trainer.scorer.loss_fn, start, batches[0])
    return Found(
        **common,
        steps=list(found.steps),
        factors=list(found.factors),
        how=list(found.how),
        loss=found.loss.tolist(),
        score=found.score.tolist(),
        calibration=_counts(found),
        shots=shots,
        cost=cost,
    )


def _trained(cell: Cell, setting: Setting) -> tuple[MetaTrainer, dict[str, float]]:
    """A trainer whose adapter is the start of the cell, and what its training cost."""
    args = copy.copy(setting.args)
    args.seed = args.data_seed = cell.seed
    by_default = cell.start == DEFAULTS
    model = new_model(replace(setting.model, **PEFT_LORA) if by_default else setting.model, cell.seed)
    for option, value in PEFT_RULE.items() if by_default else ():
        setattr(args, option, value)
    layers = AdapterLoss(model, second_order=False).stack(args.inner_rule())
    changes: dict[str, Any] = {"algorithm": cell.start} if cell.trained and cell.start != META else {}
    if cell.start == REPTILE:
        changes["fast_weights"] = None  # it has no gradient for others
    args = at_equal_compute(args, layers, **changes)
    args.output_dir = str(setting.folder / "starts" / cell.name)
    train = setting.tasks["train"]
    trainer = MetaTrainer(
        model,
        args=args,
        train_dataset=train if cell.task_count is None else first_tasks(train, cell.task_count, cell.seed),
        eval_dataset=setting.tasks["validation"],
        processing_class=setting.processor,
    )
    trainer.use_frozen_cache(setting.frozen)
    if not cell.trained:
        return trainer, {"outer_steps": 0, "training_seconds": 0.0}
    began = time.monotonic()
    trainer.train()
    trainer.save_model()
    return trainer, {"outer_steps": args.max_steps, "training_seconds": round(time.monotonic() - began, 1)}


def _by_other_rules(cell: Cell, trainer: MetaTrainer) -> list[Start]:
    """Plain and multi-task LoRA as users adapt them, by Adam on all weights, beside the rule of what is meta-learned."""
    own = trainer.args
    if cell.start not in (PLAIN, MULTITASK) or (own.inner_optimizer == "adam" and own.fast_weights is None):
        return []
    args = copy.copy(own)
    for option, value in PEFT_RULE.items():
        setattr(args, option, value)
    start, rule = trainer.start(TITLES[cell.start]), replace(args.inner_rule(), learn_rates=False)
    return [replace(start, rule=rule, hyper=rule.initial_rates(start.adapter), how="Adam on all weights")]


def _with_shots(trainer: MetaTrainer, setting: Setting, test: list[Episode], shots: int) -> list[Episode]:
    """The test episodes with another number of support rows.

    Where these are fewer, they are the first ones of each, with the same query rows. Where they are more, or of several
    classes each, episodes are drawn anew.
    """
    if trainer.args.ways is None and shots < trainer.args.shots:
        return [replace(episode, support=episode.support[:shots]) for episode in test]
    args = copy.copy(trainer.args)
    args.shots = shots
    names = dict.fromkeys(episode.task for episode in test)
    episodes = RunEpisodes(trainer.loss_fn.model, trainer.encoding, args, sharded=False)
    return episodes.held_out(setting.tasks["test"].select(names)).by_length()


def _in_context(trainer: MetaTrainer, episodes: list[Episode]) -> Scores:
    own = {name: p.detach() for name, p in trainer.scorer.loss_fn.weights.parameters().items()}
    return in_context_scores(trainer.scorer, own, episodes, trainer.data_collator, trainer.processing_class)


def _after(trainer: MetaTrainer, start: Start, episodes: list[Episode], steps: int, factor: float) -> dict[str, Any]:
    loss_fn, batches = trainer.scorer.loss_fn, trainer.batches(episodes)
    found = curve(loss_fn, start, batches, (steps,), factor=factor, scorer=trainer.scorer)
    return {"loss": found.loss[:, 0].tolist(), "score": found.score[:, 0].tolist()}


def _values(scores: Scores) -> dict[str, list[float]]:
    return {"loss": scores.loss.tolist(), "score": scores.score.tolist()}


def _counts(found: Curve) -> list[Any]:
    assert found.calibration is not None, "a curve that was just run has it"
    counts: list[Any] = found.calibration.tolist()
    return counts


def _seconds_per_step(loss_fn: AdapterLoss, start: Start, batch: Any, steps: int = 3) -> float:
    """Of one task, in a stack of several."""
    began = time.monotonic()
    adapt(loss_fn, start.adapter, start.hyper, batch.support, start.rule, steps=steps)
    return (time.monotonic() - began) / steps / batch.n_tasks
