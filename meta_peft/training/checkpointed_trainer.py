"""`transformers.Trainer` with checkpoints that are whole or not there, and enough to go on with the same bits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from meta_peft.errors import MetaPeftError
from meta_peft.processes import group
from meta_peft.processes.replicas import check_replicas
from meta_peft.survival import checkpoints, training_state
from meta_peft.utils.words import listed


class CheckpointedTrainer(Trainer, ABC):
    """What is trained a subclass knows: it says so in `_trained`, and writes and reads it in `_save` and
    `_load_from_checkpoint`; what else its run has come to, in `_progress` and `_go_on`."""

    optimizer: Any  # a torch optimizer, None until training starts
    lr_scheduler: Any
    control: Any
    started = 0.0  # when the run began, in seconds since 1970; one that is gone on with began when it first did
    in_parts = True  # a run that is stopped leaves a checkpoint, and goes on from it
    _stopped = False  # before its last outer step was made

    @abstractmethod
    def _trained(self) -> list[Tensor]:
        """The tensors that have to be the same in every process."""

    @abstractmethod
    def _progress(self) -> dict[str, Any]:
        """What the run has come to, beside weights, optimizer, schedule and random numbers: numbers, texts, tensors."""

    @abstractmethod
    def _go_on(self, progress: dict[str, Any]) -> None:
        """Take up what `_progress` gave."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.started, self._stopped = group.of_first(time.time), False
        return super().train(*args, **kwargs)

    def stop_here(self) -> None:
        """End training after this outer step, with a checkpoint to go on from if the run is one `in_parts`."""
        self.control.should_training_stop = self._stopped = True
        self.control.should_save = self.in_parts

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """With `save_total_limit` 1 the Trainer removes all checkpoints but the best one when training is over. A run that
        was stopped is not over: it goes on from its last one."""
        limit = self.args.save_total_limit
        if self._stopped:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        random = group.gathered_objects(training_state.random_numbers())
        check_replicas(self._trained())
        self.store_flos()
        parent = Path(self._get_output_dir(trial))
        folder, best = (parent / f"checkpoint-{n}" for n in (self.state.global_step, self.state.best_global_step))
        if best == folder or self._is_own(best):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            checkpoints.write(folder, partial(self._fill_checkpoint, random))
            rotate_checkpoints(
                output_dir=str(parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,  # a checkpoint of an earlier run may have a higher step, and would outlive ours
            )
        group.gathered_objects(None)  # until it is there for all of them
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _is_own(self, folder: Path) -> bool:
        """Whether there is such a checkpoint, and of this run: an earlier one may have left another in the same folder."""
        if training_state.is_in(folder):
            return training_state.started(folder) == self.started
        return folder.is_dir() and folder.stat().st_mtime >= self.started  # without a state nothing was gone on with

    def _fill_checkpoint(self, random: list[Any], folder: Path) -> None:
        self._save(str(folder))
        if not self.args.save_only_model:
            values = {
                "optimizer": self.optimizer.state_dict(),
                "made_by": self._made_by(),
                "schedule": self.lr_scheduler.state_dict(),
                "random": random,
                "started": self.started,
                **self._progress(),
            }
            training_state.save(folder, values)
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, kept = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(kept)
                else:
                    self.state.stateful_callbacks[name] = kept
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        values = training_state.load(Path(checkpoint))
        self.started = values.get("started", 0.0)  # checkpoints from before it was kept have none
        self._restore_optimizer(Path(checkpoint), values)
        self._go_on(values)

    def _made_by(self) -> dict[str, str]:
        """What has to be the same where a run goes on, and is not told by the shapes of its state."""
        made = getattr(self.optimizer, "optimizer", self.optimizer)  # which Accelerate's holds
        schedule = self.args.lr_scheduler_type
        return {"optimizer": type(made).__name__, "schedule": str(getattr(schedule, "value", schedule))}

    def _restore_optimizer(self, checkpoint: Path, values: dict[str, Any]) -> None:
        """Raise `MetaPeftError` if the state is of another optimizer or of other parameters, which torch finds out late."""
        there = values.get("made_by", {})  # earlier checkpoints do not say, or not all of it
        others = [f"{what} ({there[what]})" for what, here in self._made_by().items() if there.get(what, here) != here]
        own = [set(of) for of in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(values["optimizer"])
            self.lr_scheduler.load_state_dict(values["schedule"])
            # Options of a group that the checkpoint has not would be missed in the next step.
            fits = all(names <= set(of) for names, of in zip(own, self.optimizer.param_groups, strict=True))
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if others or not fits:
            raise MetaPeftError(
                f"The {listed(others) or 'algorithm, the optimizer or the schedule'} of {checkpoint} is not that of these"
                " options: resume with the options that the checkpoint was made with, such as the same algorithm,"
                " learn_inner_lr, optim and lr_scheduler_type, and with the same tasks; or train anew, in another"
                " output_dir."
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        random = training_state.load(Path(checkpoint))["random"]
        if len(random) == self.args.world_size:
            training_state.set_random_numbers(random[self.args.process_index])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
