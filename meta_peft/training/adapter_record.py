"""What a training run keeps with its adapter: the sidecar that `adapt` reads, and the card that people read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from meta_peft.adapters import hub
from meta_peft.adapters.adapter_files import WEIGHTS, tensor_shapes
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.card import CardResults, model_card
from meta_peft.adapters.sidecar import Judged, Sidecar
from meta_peft.adapters.tokenizer_identity import TokenizerIdentity
from meta_peft.config import MetaLoraConfig
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.outer_loop.outer_loop import LearnedRates
from meta_peft.tasks import Encoding
from meta_peft.tasks.row_form import RowForm

ON_THE_CARD = (
    *("max_steps", "tasks_in_a_step", "learning_rate", "inner_lr_learning_rate", "lr_scheduler_type", "shots"),
    *("query_size", "inner_steps", "inner_optimizer", "inner_lr", "fast_weights", "task_sampling", "seed"),
)


@dataclass
class AdapterRecord:
    """Writes and reads the folder of an adapter in training.

    Args:
        loss_fn: the model whose adapter is trained.
        rates: the learned rates.
        args: the run's options.
        encoding: of rows.
        base: which base model it is.
        processor: the tokenizer, or a processor that has one.
        row_form: what was done to rows of the data, and is to be done to others like them.
        task_columns: which then name the tasks of rows; by default those that the options name.
        rate_factors: by how much `adapt` multiplies the rates for a number of steps, as an evaluation found.
        results: what the card shows.
    """

    loss_fn: AdapterLoss
    rates: LearnedRates
    args: MetaLoraConfig
    encoding: Encoding
    base: BaseIdentity
    processor: Any
    row_form: RowForm = field(default_factory=RowForm)
    task_columns: tuple[str, ...] = ()
    rate_factors: dict[int, float] = field(default_factory=dict)
    results: CardResults = field(default_factory=CardResults)

    def sidecar(self) -> Sidecar:
        columns = self.task_columns or self.args.task_columns
        return Sidecar(
            algorithm=self.args.algorithm,
            inner=self.args.inner_rule(),
            names=tuple(self.loss_fn.weights.parameters()),
            log_rates=self.rates.log_rates.detach().cpu().clone(),
            prompt_format=self.encoding.prompt_format,
            max_length=self.args.max_length,
            base=self.base,
            shots=self.args.shots,
            rate_factors=self.rate_factors,
            objective=self.encoding.objective,
            facts=self.encoding.facts,
            judged=Judged(self.args.metric, columns, self.args.labelling(), self.args.held_out_seed),
            tokenizer=TokenizerIdentity.of(self.encoding.tokenizer),
            row_form=self.row_form,
        )

    def attach(self) -> None:
        """Make the model carry what `meta_peft.adapt` needs."""
        hub.attach(self.loss_fn.model, self.sidecar(), self.processor, self.loss_fn.weights.adapter)

    def save(self, folder: str, repo_id: str | None) -> None:
        """The adapter with its sidecar and its card, as it is now."""
        of_classes = () if self.args.ways is None else ("ways", "label_words")
        options = {name: getattr(self.args, name) for name in (*ON_THE_CARD, *of_classes)}
        sidecar = self.sidecar()
        card = model_card(sidecar, repo_id, self.results, options, ask_hub=self.args.push_to_hub)
        hub.save(self.loss_fn.model, sidecar, folder, card=card, adapter=self.loss_fn.weights.adapter)

    def restore(self, folder: Path) -> None:
        """Put the adapter and the rates of a checkpoint in place.

        Raises:
            MetaPeftError: they belong to another base model, or to other options.
        """
        sidecar = Sidecar.read(folder)
        sidecar.base.check(self.base)
        sidecar.check_tokenizer(self.encoding.tokenizer)
        if sidecar.log_rates.shape != self.rates.log_rates.shape:
            raise MetaPeftError(
                f"The checkpoint has inner rates of shape {list(sidecar.log_rates.shape)}, these options make"
                f" {list(self.rates.log_rates.shape)}: resume with the same inner_steps, inner_lr_per_step,"
                " inner_lr_per_entry and fast_weights."
            )
        weights = self.loss_fn.weights.parameters()
        for name, shape in tensor_shapes(folder, tuple(weights)).items():
            if shape != list(weights[name].shape):
                raise MetaPeftError(
                    f"The checkpoint's {name} is {shape}, with these options it is {list(weights[name].shape)}: resume with"
                    " the same lora_r and lora_target_modules."
                )
        self.loss_fn.weights.load_(load_file(folder / WEIGHTS))
        with torch.no_grad():
            self.rates.log_rates.copy_(sidecar.log_rates)
