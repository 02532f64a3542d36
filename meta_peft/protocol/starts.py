"""The starts that are compared: each a trainer that holds the adapter, trained if the start is one that is trained."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

from peft import PeftModel

from meta_peft.base.new_adapter import new_model
from meta_peft.comparison.compare import some_tasks, with_peft_rule
from meta_peft.comparison.early_stops import train_with_stops
from meta_peft.comparison.equal_compute import at_equal_compute
from meta_peft.config import MetaLoraConfig
from meta_peft.evaluation.evaluate import Start
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.lora.fast_weights import is_lora
from meta_peft.protocol.arguments import (
    DEFAULTS,
    IMPLICIT,
    META,
    MULTITASK,
    NEW_HEAD,
    REPTILE,
    TASK_HEADS,
    TITLES,
)
from meta_peft.protocol.cells import Cell, check_length
from meta_peft.protocol.setting import Setting
from meta_peft.protocol.task_heads import TaskHeadsTrainer
from meta_peft.run_tasks.run_episodes import labels_of
from meta_peft.tasks import TaskSet
from meta_peft.tasks.encoding.classes import class_count
from meta_peft.tasks.labelling import numbered_within
from meta_peft.training.trainer import MetaTrainer

# What `LoraConfig` has by default: LoRA of rank 8 where PEFT puts it in a model of this kind.
PEFT_LORA: dict[str, Any] = {
    **{"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    **{"lora_target_modules": None, "lora_layers": None},
}

PROXIMAL = 1.0  # the pull of implicit MAML towards the start, where the run's own options have none


def trained(cell: Cell, setting: Setting) -> tuple[MetaTrainer, list[Start], dict[str, float]]:
    """A trainer whose adapter is the start of the cell; that start, and what it was earlier in its training; and what its
    training cost.
    """
    by_default = cell.start == DEFAULTS
    model = new_model(replace(setting.model, **PEFT_LORA) if by_default else setting.model, cell.seed)
    args = _options(cell, setting, model)
    if cell.trained:
        check_length(cell, args.max_steps, setting.lengths)
    title, cost = TITLES[cell.start], {"outer_steps": 0.0, "training_seconds": 0.0}
    trainer = _trainer(model, args, cell, setting)
    starts = [trainer.start(title)]
    if cell.start in NEW_HEAD:
        learned, cost = _features(cell, setting, args)
        starts = [_with_features(starts[0], of) for of in learned]
        trainer.take(starts[0])
    elif cell.trained:
        starts, cost = _train(trainer, title)
    if cell.trained:
        trainer.save_model()
    return trainer, starts, cost


def _options(cell: Cell, setting: Setting, model: PeftModel) -> MetaLoraConfig:
    """Those of the run, for the algorithm of the cell at equal compute."""
    args = with_peft_rule(setting.args) if cell.start == DEFAULTS else copy.copy(setting.args)
    args.seed = args.data_seed = cell.seed
    args.output_dir = str(setting.folder / "starts" / cell.name)
    layers = AdapterLoss(model, second_order=False).stack(args.inner_rule())
    changes: dict[str, Any] = {}
    if cell.trained and cell.start != META:
        changes["algorithm"] = MULTITASK if cell.start in NEW_HEAD else cell.start
    if cell.start == REPTILE:
        changes["fast_weights"] = None  # it has no gradient for others
    if cell.start == IMPLICIT:  # what it is the gradient of
        changes |= {"proximal": args.proximal or PROXIMAL, "inner_weight_decay": 0.0}
    return at_equal_compute(args, layers, _tasks(cell, setting), **changes)


def _trainer(model: PeftModel, args: MetaLoraConfig, cell: Cell, setting: Setting) -> MetaTrainer:
    validation = setting.tasks["validation"]
    processor = setting.processor
    trainer = MetaTrainer(model, args, _tasks(cell, setting), eval_dataset=validation, processing_class=processor)
    trainer.use_frozen_cache(setting.frozen)
    return trainer


def _tasks(cell: Cell, setting: Setting) -> TaskSet:
    train = setting.tasks["train"]
    return train if cell.task_count is None else some_tasks(train, cell.task_count, cell.seed)


def _train(trainer: MetaTrainer, title: str) -> tuple[list[Start], dict[str, float]]:
    """What was learned, and what it cost."""
    began = time.monotonic()
    starts = train_with_stops(trainer, title)
    return starts, {"outer_steps": trainer.args.max_steps, "training_seconds": round(time.monotonic() - began, 1)}


def _with_features(start: Start, learned: Start) -> Start:
    """The LoRA matrices of the one under the head of the other."""
    lora = {name: value for name, value in learned.adapter.items() if is_lora(name)}
    return replace(start, adapter={**start.adapter, **lora}, how=learned.how, part=learned.part)


def _features(cell: Cell, setting: Setting, args: MetaLoraConfig) -> tuple[list[Start], dict[str, float]]:
    """LoRA matrices learned under other heads than the one that adapts: one for the labels of all training tasks, the
    baseline of Chen et al., ICLR 2019, arXiv 1904.04232, or one for each training task.

    Rows are as many as in the episodes of classes.
    """
    tasks = _tasks(cell, setting)
    args = copy.copy(args)
    args.ways, args.label_words = None, "given"
    args.shots, args.query_size = (n * (setting.args.ways or 1) for n in (args.shots, args.query_size))
    if cell.start == TASK_HEADS:
        tasks = numbered_within(tasks)
    model = new_model(replace(setting.model, num_labels=class_count(labels_of(tasks))), cell.seed)
    kind = TaskHeadsTrainer if cell.start == TASK_HEADS else MetaTrainer
    trainer = kind(model, args, tasks, processing_class=setting.processor)
    trainer.use_frozen_cache(setting.frozen)
    return _train(trainer, TITLES[cell.start])
