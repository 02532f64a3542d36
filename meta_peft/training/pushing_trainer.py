"""A trainer whose checkpoints are adapters, pushed to the hub with what belongs to them, and whose hub may refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from meta_peft.adapters import hub
from meta_peft.adapters.hub_errors import explained
from meta_peft.errors import MetaPeftError
from meta_peft.training.checkpointed_trainer import CheckpointedTrainer

logger = logging.getLogger("meta_peft")


class PushingTrainer(CheckpointedTrainer):
    """What `transformers.Trainer` does at the hub, for a folder with an adapter, its sidecar and its card."""

    @property
    def _hub_name(self) -> str:
        """What its repository is called, or is going to be."""
        return getattr(self, "hub_model_id", None) or self.args.hub_model_id or Path(str(self.args.output_dir)).name

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with explained(f"The hub gives no repository for {self._hub_name!r}", writing=True):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.push_to_hub`: save the adapter with its sidecar and card, and upload the folder without checkpoints.

        Raises:
            MetaPeftError: the hub refuses it.
        """
        with explained(f"The hub does not take the adapter as {self._hub_name!r}", writing=True):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint's adapter with its own sidecar, which the Trainer would leave out.

        Nor are the run's arguments pushed, which the Trainer pickles with the token in them. A hub that refuses does not
        end training: the next checkpoint is tried, and `save_model` raises.
        """
        args, folder = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == "end":
            return
        whole = {"checkpoint": "last-checkpoint", "all_checkpoints": folder.name}.get(str(args.hub_strategy.value))
        to: dict[str, Any] = {"token": args.hub_token, "revision": args.hub_revision}
        try:
            with explained(f"The hub does not take {folder.name} as {self._hub_name!r}", writing=True):
                hub.push_checkpoint(folder, self._hub_name, step=self.state.global_step, whole=whole, **to)
        except MetaPeftError as error:
            logger.warning("%s. Training goes on.", error)
