"""`MetaTrainer`: meta-training with everything that users of `transformers.Trainer` know. Glue, no mathematics.

The Trainer brings logging, trackers, schedules, callbacks, checkpoints, resuming and the hub. What is replaced is the
training step (a meta-gradient instead of a backward pass), the optimizer's parameter groups, what is saved (an adapter
with its sidecar instead of a model), and evaluation (adapt, then score).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from meta_peft import hub
from meta_peft.base_model import BaseIdentity, load_base, load_tokenizer, with_adapter
from meta_peft.card import model_card
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.evaluate import Start, curve
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.outer_loop import LearnedRates, bind, meta_gradient
from meta_peft.params import flatten, unflatten
from meta_peft.sidecar import Sidecar
from meta_peft.tasks import EpisodeCollator, EpisodeDataset, TaskSet
from meta_peft.types import Episode, EpisodeBatch, MetaGradient, Params


class MetaTrainer(Trainer):
    """Meta-train a LoRA adapter of a frozen language model.

    Args:
        model: a `PeftModel`; or a model, or the name of one, with `peft_config` saying where LoRA goes.
        args: options of the run.
        train_dataset: tasks to learn from: whatever `TaskSet.of` takes (a `datasets.Dataset` with a task column, a
            mapping of task names to rows, rows, the path of a JSONL file).
        eval_dataset: other tasks, to be evaluated on.
        processing_class: the base model's tokenizer; found by the model's name if not given.
        peft_config: a `LoraConfig`, unless the model is a `PeftModel` already.
        callbacks, optimizers: as in `transformers.Trainer`.

    After `train()` the model is ready for `meta_peft.adapt`.
    """

    args: MetaLoraConfig
    data_collator: EpisodeCollator
    optimizer: torch.optim.Optimizer | None
    control: Any

    def __init__(
        self,
        model: Any,
        args: MetaLoraConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = args or MetaLoraConfig()
        tasks = None if train_dataset is None else TaskSet.of(train_dataset, args.task_column)
        eval_tasks = None if eval_dataset is None else TaskSet.of(eval_dataset, args.task_column)
        if tasks is not None:
            tasks.check_rows(args.shots, args.query_size)
            if eval_tasks is not None:
                tasks.check_disjoint(eval_tasks)
        peft_model = _peft_model(model, peft_config)
        self.algorithm = args.algorithm_object()
        self.schedule, self.memory_plan = args.schedule(), args.memory_plan()
        self.loss_fn = bind(peft_model, self.algorithm, checkpoint=args.gradient_checkpointing)
        self.rates = LearnedRates(args.inner_rule(), dict(self.loss_fn.weights.parameters()))
        self._identity = BaseIdentity.of(peft_model.get_base_model())
        self._rate_factors: dict[int, float] = {}
        self._results: dict[str, Any] = {}
        tokenizer = processing_class or load_tokenizer(self._identity.name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._prompt_format = args.prompt_format()

        super().__init__(
            model=peft_model,
            args=args,
            data_collator=EpisodeCollator(tokenizer.pad_token_id),
            train_dataset=None if tasks is None else self._training_episodes(tasks, tokenizer, args),
            eval_dataset=None if eval_tasks is None else self.evaluation_episodes(eval_tasks, tokenizer, args),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        if self.callback_handler.pop_callback(ProgressCallback) is not None:
            self.callback_handler.add_callback(LossInProgressBar)

    # ---- data

    def _training_episodes(self, tasks: TaskSet, tokenizer: Any, args: MetaLoraConfig) -> EpisodeDataset:
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        encoded = tasks.encoded(self._prompt_format, tokenizer, args.max_length)
        length = args.max_steps * per_step
        return EpisodeDataset(encoded, shots=args.shots, query_size=args.query_size, seed=args.seed, length=length)

    def evaluation_episodes(self, tasks: TaskSet, tokenizer: Any = None, args: Any = None) -> EpisodeDataset:
        """One fixed episode of each task, with as many query rows as its rows and `eval_query_size` allow."""
        args, tokenizer = args or self.args, tokenizer or self.processing_class
        fewest = min(len(rows) for rows in tasks.rows_of.values())
        query_size = max(1, min(args.eval_query_size, fewest - args.shots))
        encoded = tasks.encoded(self._prompt_format, tokenizer, args.max_length)
        return EpisodeDataset(encoded, shots=args.shots, query_size=query_size, seed=args.seed + 1, shuffle=False)

    def batches(self, episodes: Sequence[Episode]) -> list[EpisodeBatch]:
        """Episodes stacked for evaluation."""
        return [b.to(self.args.device) for b in self.data_collator.stacks(episodes, self.args.eval_batch_size)]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # episode i is already a random draw

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        """Losses are means over tasks, so there are no tokens to count."""

    def floating_point_ops(self, inputs: EpisodeBatch) -> int:
        """Not estimated: the Trainer's formula knows no inner loop."""
        return 0

    # ---- the outer step

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The adapter's initialisation and the learned rates, each with a learning rate of its own."""
        if self.optimizer is None:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups: list[dict[str, Any]] = [
                {"params": list(self.loss_fn.weights.parameters().values()), "weight_decay": self.args.weight_decay}
            ]
            if self.rates.log_rates.requires_grad:
                rate = self.args.inner_lr_learning_rate
                groups.append({"params": [self.rates.log_rates], "lr": rate, "weight_decay": 0.0})
            self.optimizer = kind(groups, **options)
        # After a step the Trainer clears the gradients of its model, of which the rates are no part.
        self.optimizer.register_step_post_hook(lambda *_: self.rates.zero_grad())
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: EpisodeBatch, num_items_in_batch: Any = None) -> Tensor:
        """Accumulate the meta-gradient of a batch of tasks; returns its mean loss."""
        gradient = meta_gradient(
            self.loss_fn,
            inputs.to(self.args.device),
            self.schedule.at(self.state.global_step),
            self.rates,
            tasks_per_forward=self.memory_plan,
        )
        share = 1 / self.current_gradient_accumulation_steps
        named: dict[str, nn.Parameter] = {**self.loss_fn.weights.parameters(), RATES: self.rates.log_rates}
        for name, grad in self._mean_over_ranks(gradient).items():
            parameter = named[name]
            parameter.grad = share * grad if parameter.grad is None else parameter.grad + share * grad
        return share * gradient.metrics["loss"].mean()

    def _mean_over_ranks(self, gradient: MetaGradient) -> Params:
        """The mean over all tasks of all ranks: one reduction of one vector, weighted by how many tasks a rank had."""
        grads: Params = {**gradient.grads.adapter, **gradient.grads.hyper}
        if self.args.world_size == 1:
            return grads
        own = flatten(grads) * gradient.n_tasks
        total = self.accelerator.reduce(torch.cat([own, own.new_tensor([gradient.n_tasks])]), reduction="sum")
        return unflatten(total[:-1] / total[-1], grads)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The adapter and the rates are clipped apart: their gradients differ by orders of magnitude."""
        if self.rates.log_rates.grad is not None:
            nn.utils.clip_grad_norm_([self.rates.log_rates], self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Query loss and exact match on held-out tasks, before and after the inner steps."""
        episodes = self.eval_dataset if eval_dataset is None else eval_dataset
        if episodes is None:
            raise MetaPeftError("There are no tasks to evaluate on: give eval_dataset.")
        if not isinstance(episodes, EpisodeDataset):
            episodes = self.evaluation_episodes(TaskSet.of(episodes, self.args.task_column))
        result = curve(
            self.loss_fn, self.start(), self.batches(episodes.by_length()), (0, max(self.args.inner_steps, 1))
        )
        metrics = {
            f"{metric_key_prefix}_loss_before": float(result.loss[:, 0].mean()),
            f"{metric_key_prefix}_loss": float(result.loss[:, 1].mean()),
            f"{metric_key_prefix}_worst_loss": float(result.loss[:, 1].max()),
            f"{metric_key_prefix}_exact_match": float(np.mean(result.exact_match[:, 1])),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def start(self, name: str = "meta-learned") -> Start:
        """The adapter as it is now, with its rule and rates, to evaluate adaptation from."""
        adapter = {n: p.detach().clone() for n, p in self.loss_fn.weights.parameters().items()}
        hyper = {n: v.detach().clone() for n, v in self.rates.values().items()}
        return Start(name, adapter, hyper, self.args.inner_rule())

    # ---- saving

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; afterwards the model carries what `meta_peft.adapt` needs."""
        result = super().train(*args, **kwargs)
        self.attach()
        return result

    def attach(self) -> None:
        hub.attach(self.loss_fn.model, self.sidecar(), self.processing_class)

    def record(self, *, rate_factors: dict[int, float] | None = None, results: dict[str, Any] | None = None) -> None:
        """Keep what an evaluation found: rate factors for `adapt`, a table for the model card."""
        self._rate_factors = rate_factors or self._rate_factors
        self._results = results or self._results
        self.attach()

    def sidecar(self) -> Sidecar:
        return Sidecar(
            algorithm=self.args.algorithm,
            inner=self.args.inner_rule(),
            names=tuple(self.loss_fn.weights.parameters()),
            log_rates=self.rates.log_rates.detach().cpu().clone(),
            prompt_format=self._prompt_format,
            max_length=self.args.max_length,
            base=self._identity,
            shots=self.args.shots,
            rate_factors=self._rate_factors,
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            card = model_card(self.sidecar(), self.args.hub_model_id, self._results)
            hub.save(self.loss_fn.model, self.sidecar(), output_dir or str(self.args.output_dir), card=card)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written with the adapter (see `_save`)."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        sidecar = Sidecar.read(folder)
        sidecar.base.check(self._identity)
        if sidecar.log_rates.shape != self.rates.log_rates.shape:
            raise MetaPeftError(
                f"The checkpoint has inner rates of shape {list(sidecar.log_rates.shape)}, these options make"
                f" {list(self.rates.log_rates.shape)}: resume with the same inner_steps, inner_lr_per_step,"
                " inner_lr_per_entry and fast_weights."
            )
        self.loss_fn.weights.load_(load_file(folder / "adapter_model.safetensors"))
        with torch.no_grad():
            self.rates.log_rates.copy_(sidecar.log_rates)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class LossInProgressBar(ProgressCallback):
    """The Trainer's bar with the latest loss in it, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def _peft_model(model: Any, peft_config: LoraConfig | None) -> PeftModel:
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise MetaPeftError("The model is a PeftModel already: leave peft_config out, or give the base model.")
        return model
    if peft_config is None:
        raise MetaPeftError("Where LoRA goes is not said: give peft_config=LoraConfig(...), or a PeftModel.")
    return with_adapter(load_base(ModelArguments(model)) if isinstance(model, str) else model, peft_config)
