"""`MetaTrainer`: meta-training with everything that users of `transformers.Trainer` know. Glue, no mathematics.

The Trainer brings logging, trackers, schedules, callbacks, checkpoints, resuming and the hub. What is replaced is the
training step (a meta-gradient instead of a backward pass), the optimizer's parameter groups, what is saved (an adapter
with its sidecar instead of a model), and evaluation (adapt, then score).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.card import CardResults
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.base.new_adapter import peft_model_of
from meta_peft.base.placing import place
from meta_peft.base.tokenizers import agree_on_padding, load_tokenizer
from meta_peft.config import MetaLoraConfig
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.evaluate import Start, curve
from meta_peft.evaluation.scoring import scorer_for
from meta_peft.frozen.cache import FrozenCache
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.lora.whole_head import fixed_start
from meta_peft.objectives import objective_name
from meta_peft.outer_loop.outer_loop import LearnedRates, assign_gradient, bind
from meta_peft.outer_loop.outer_step import OuterStep
from meta_peft.processes import Share, StepShares, attempt, group
from meta_peft.processes.replicas import same_everywhere
from meta_peft.processes.step_shares import only
from meta_peft.run_tasks.run_episodes import RunEpisodes, most_classes, run_encoding
from meta_peft.sharding import shard_as_asked
from meta_peft.survival import checkpoints
from meta_peft.survival.claim import Claim
from meta_peft.survival.stop_signal import StopSignal
from meta_peft.tasks import Encoding, EpisodeCollator, EpisodeDataset, TaskSet
from meta_peft.tasks.encoding import tokenizer_of
from meta_peft.tasks.labelling import episodes_of
from meta_peft.tasks.sampling import Adaptive
from meta_peft.training.adapter_record import AdapterRecord
from meta_peft.training.pushing_trainer import PushingTrainer
from meta_peft.training.run_log import RunLog
from meta_peft.training.tracking import (
    LossInProgressBar,
    PictureCallback,
    adaptation_picture,
    rate_pictures,
    task_curves,
)
from meta_peft.training.trainer_options import check_best_metric, check_evaluation, check_optimizer
from meta_peft.types import Episode, EpisodeBatch

logger = logging.getLogger("meta_peft")


class MetaTrainer(PushingTrainer):
    """Meta-train a LoRA adapter of a frozen language model.

    Args:
        model: a `PeftModel`; or a model, or the name of one, with `peft_config` saying where LoRA goes.
        args: options of the run.
        train_dataset: tasks to learn from: whatever `TaskSet.of` takes (a `datasets.Dataset` with a task column, a
            mapping of task names to rows, rows, the path of a file or a folder).
        eval_dataset: other tasks, to be evaluated on.
        processing_class: the base model's tokenizer, or its processor for speech; found by the model's name if not given.
        peft_config: a `LoraConfig`, unless the model is a `PeftModel` already.
        callbacks: as in `transformers.Trainer`.
        optimizers: the same.
        encoding: how rows become features; by default as the model, its tokenizer and `args` say.

    `fixed` are the names of weights that inner steps move and no outer step does (`learn_head`).

    After `train()` the model is ready for `meta_peft.adapt`. If SIGTERM or Ctrl-C came, `interrupted` is the signal's
    number, and the last outer step has a checkpoint; one that came after it, as in a last evaluation, makes none.
    """

    args: MetaLoraConfig
    data_collator: EpisodeCollator

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
        encoding: Encoding | None = None,
    ):
        args = args or MetaLoraConfig()
        check_optimizer(args, optimizers)
        check_evaluation(args, validation=eval_dataset is not None)
        tasks = None if train_dataset is None else TaskSet.of(train_dataset, args.task_column)
        eval_tasks = None if eval_dataset is None else TaskSet.of(eval_dataset, args.task_column)
        if tasks is not None:
            episodes_of(tasks, args.labelling()).check_rows(args.shots, args.query_size)
            if eval_tasks is not None:
                tasks.check_disjoint(eval_tasks)
        given = [of_split for of_split in (tasks, eval_tasks) if of_split is not None]
        peft_model = peft_model_of(
            model, peft_config, args.seed, partial(most_classes, given, args.ways, args.label_words)
        )
        self.algorithm = args.algorithm_object()
        shares = args.world_size * args.gradient_accumulation_steps
        sharded = shard_as_asked(peft_model, self.algorithm, tasks_per_step=args.tasks_in_a_step, shares=shares)
        if not sharded:
            place(peft_model, args.device, args.place_model_on_device)
        self.schedule, self.memory_plan = args.schedule(), args.memory_plan()
        self.loss_fn = bind(peft_model, self.algorithm, checkpoint=args.gradient_checkpointing)
        self.rates = LearnedRates(args.inner_rule(), dict(self.loss_fn.weights.parameters()))
        self.fixed = frozenset() if args.learns_head else fixed_start(peft_model, args.inner_rule(), args.learn_head)
        identity = BaseIdentity.of(peft_model.get_base_model())
        self.interrupted: int | None = None
        self._signal = StopSignal()
        self.run_log = RunLog()
        self._skipped = 0  # updates in a row that were not made
        self._held_out: tuple[list[str], np.ndarray, np.ndarray] | None = None  # query losses of the last evaluation
        self._failure: MetaPeftError | None = None
        base = peft_model.get_base_model()
        objective = objective_name(base)
        check_best_metric(args, objective)
        processor = processing_class or load_tokenizer(identity.name, objective=objective)
        tokenizer = tokenizer_of(processor)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        agree_on_padding(base, objective, tokenizer)
        self.encoding = encoding or run_encoding(base, objective, args, processor, given)
        read = (given[0].row_form, given[0].task_columns) if given else ()
        self.adapter_record = AdapterRecord(self.loss_fn, self.rates, args, self.encoding, identity, processor, *read)
        self._episodes = RunEpisodes(peft_model, self.encoding, args, sharded)
        self.scorer = scorer_for(
            args.metric,
            AdapterLoss(peft_model, second_order=False, checkpoint=args.gradient_checkpointing),
            tokenizer,
            max_new_tokens=args.max_new_tokens,
            choice_score=args.choice_score,
        )

        super().__init__(
            model=peft_model,
            args=args,
            data_collator=self.encoding.collator(),
            train_dataset=None if tasks is None else self._episodes.training(tasks),
            eval_dataset=None if eval_tasks is None else self._episodes.held_out(eval_tasks),
            processing_class=processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False
        self.use_frozen_cache(FrozenCache(args.frozen_cache_gb * 1e9))
        self.outer_step = OuterStep(
            self.loss_fn,
            self.rates,
            self.memory_plan,
            in_order=args.deterministic_reduction,
            in_lockstep=sharded,
            device=args.device,
            sampling=self._adaptive_sampling(),
            fixed=self.fixed,
        )
        if self.callback_handler.pop_callback(ProgressCallback) is not None:
            self.callback_handler.add_callback(LossInProgressBar)
        self.add_callback(PictureCallback(self._pictures, lambda: self.callback_handler.callbacks, self._curves))

    def use_frozen_cache(self, cache: FrozenCache) -> None:
        """Share what another trainer keeps of the same base, if that is to be kept at all (`frozen_cache_gb`)."""
        self.frozen_cache = cache
        if self.args.frozen_cache_gb:
            for loss_fn in (self.loss_fn, self.scorer.loss_fn):
                loss_fn.keep_frozen(cache)

    # ---- data

    def evaluation_episodes(self, tasks: TaskSet) -> EpisodeDataset:
        """One fixed episode of each task, with as many query rows as its rows and `eval_query_size` allow."""
        return self._episodes.held_out(tasks)

    def batches(self, episodes: Sequence[Episode]) -> list[EpisodeBatch]:
        """Episodes stacked for evaluation."""
        return [b.to(self.args.device) for b in self.data_collator.stacks(episodes, self.args.eval_batch_size)]

    def get_train_dataloader(self) -> DataLoader[Share]:
        """This process's shares of the outer steps. It is not prepared: who reads what is settled here."""
        if self.train_dataset is None:
            raise MetaPeftError("There are no tasks to train on: give train_dataset.")
        args = self.args
        shares = StepShares(
            self.train_dataset,
            self.data_collator,
            tasks_per_step=args.tasks_in_a_step,
            turns=args.gradient_accumulation_steps,
            processes=args.world_size,
            process=args.process_index,
            one_by_one=args.deterministic_reduction,
        )
        workers: dict[str, Any] = {"num_workers": args.dataloader_num_workers}
        if args.dataloader_num_workers:
            workers["persistent_workers"] = args.dataloader_persistent_workers
            workers["prefetch_factor"] = args.dataloader_prefetch_factor
        return DataLoader(shares, batch_size=1, collate_fn=only, **workers)

    def get_total_train_batch_size(self, args: Any) -> int:
        return int(args.tasks_in_a_step)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.run_log.data_wait.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        """Losses are means over tasks, so there are no tokens to count."""

    def floating_point_ops(self, inputs: Share) -> int:
        """Not estimated: the Trainer's formula knows no inner loop."""
        return 0

    def _adaptive_sampling(self) -> Adaptive | None:
        found = None if self.train_dataset is None else self.train_dataset.sampling
        return found if isinstance(found, Adaptive) else None

    def _losses_before(self) -> np.ndarray:
        """The loss of each training task before any step, ``[N]``, the same numbers in every process."""
        args = self.args
        each = EpisodeDataset(
            self.train_dataset.tasks, shots=args.shots, query_size=args.query_size, seed=args.seed, shuffle=False
        )
        in_order = self.batches(list(each))
        losses = curve(self.scorer.loss_fn, self.start(), in_order, (0,)).loss[:, 0]
        return group.from_first(torch.from_numpy(losses).to(args.device)).cpu().numpy()

    # ---- the outer step

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The adapter's initialisation and the learned rates, each with a learning rate of its own."""
        rates_learn = self.rates.log_rates.requires_grad
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups: list[dict[str, Any]] = [
                {"params": list(self.loss_fn.weights.parameters().values()), "weight_decay": self.args.weight_decay}
            ]
            if rates_learn:
                rate = self.args.inner_lr_learning_rate
                groups.append({"params": [self.rates.log_rates], "lr": rate, "weight_decay": 0.0})
            self.optimizer = kind(groups, **options)
        elif rates_learn and all(
            p is not self.rates.log_rates for g in self.optimizer.param_groups for p in g["params"]
        ):
            raise MetaPeftError(
                "The optimizer given in optimizers does not hold the inner learning rates, so they would never be learned:"
                " set learn_inner_lr=False, or choose the optimizer with optim and optim_args."
            )
        return self.optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The base is never prepared: wrapped, it would reduce gradients in hooks that no meta-gradient runs.

        What the Trainer gets has the model's parameters and is not its model, so that it prepares nothing.
        """
        return nn.ModuleList([self.loss_fn.model])

    def training_step(self, model: nn.Module, inputs: Share, num_items_in_batch: Any = None) -> Tensor:
        """Compute this process's share; with the last one of an outer step, its update. Returns the step's mean loss."""
        self.outer_step.add(inputs, self.schedule.at(self.state.global_step))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        total, wrong = self.outer_step.total(stop=self._signal.received is not None)
        self.run_log.count(total.gradient.n_tasks, total.diverged)
        self.rates.zero_grad()  # which the Trainer does not: they are no part of its model
        if wrong:
            self._skip_update(wrong)
        else:
            self._skipped = 0
            assign_gradient(total.gradient, self.loss_fn, self.rates, fixed=self.fixed)
        if total.stop:
            self.stop_here()
        return total.gradient.metrics["loss"].mean().to(self.args.device, torch.float32)

    def _skip_update(self, wrong: list[str]) -> None:
        """Leave everything as it is, and say why; too often in a row, stop."""
        self._skipped += 1
        step = self.state.global_step + 1
        if self.is_world_process_zero():
            logger.warning("Outer step %d changes nothing, its gradient is not finite: %s.", step, "; ".join(wrong))
        if self._skipped >= self.args.max_skipped_updates:
            kept = f" The state before them is in checkpoint-{step} of {self.args.output_dir}." if self.in_parts else ""
            self._failure = MetaPeftError(
                f"The gradients of {self._skipped} outer steps in a row were not finite (the last one: {'; '.join(wrong)})."
                f"{kept} Smaller inner_lr or learning_rate, inner_max_grad_norm, or other data for the tasks named may"
                " help."
            )
            self.stop_here()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The adapter and the rates are clipped apart: their gradients differ by orders of magnitude."""
        if self.rates.log_rates.grad is not None:
            self.run_log.rate_grad_norm = nn.utils.clip_grad_norm_([self.rates.log_rates], self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Query loss on held-out tasks before and after the inner steps, and the metric after them."""
        episodes = self.eval_dataset if eval_dataset is None else eval_dataset
        if episodes is None:
            raise MetaPeftError("There are no tasks to evaluate on: give eval_dataset.")
        if not isinstance(episodes, EpisodeDataset):
            episodes = self.evaluation_episodes(TaskSet.of(episodes, self.args.task_column))
        drawn, steps = episodes.by_length(), (0, max(self.args.inner_steps, 1))
        result = curve(self.scorer.loss_fn, self.start(), self.batches(drawn), steps, scorer=self.scorer)
        self._held_out = [episode.task for episode in drawn], result.loss[:, 0], result.loss[:, 1]
        metrics = {
            f"{metric_key_prefix}_loss_before": float(result.loss[:, 0].mean()),
            f"{metric_key_prefix}_loss": float(result.loss[:, 1].mean()),
            f"{metric_key_prefix}_worst_loss": float(result.loss[:, 1].max()),
            f"{metric_key_prefix}_{result.metric}": float(np.mean(result.score[:, 1])),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """There is none: what is predicted depends on the examples that it was adapted to."""
        raise MetaPeftError(
            "A meta-learned adapter predicts nothing before it is adapted: meta_peft.adapt gives a model for one task, and"
            " evaluate scores held-out tasks."
        )

    def start(self, name: str = "meta-learned") -> Start:
        """The adapter as it is now, with its rule and rates, to evaluate adaptation from."""
        adapter = {n: p.detach().clone() for n, p in self.loss_fn.weights.parameters().items()}
        hyper = {n: v.detach().clone() for n, v in self.rates.values().items()}
        return Start(name, adapter, hyper, self.args.inner_rule())

    @torch.no_grad()
    def take(self, start: Start) -> None:
        """Hold the adapter and the rates of a start that this trainer had, or one that has its rule."""
        self.loss_fn.weights.load_(start.adapter)
        self.rates.log_rates.copy_(start.hyper[RATES])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.run_log.line(self.outer_step.losses_before)
            self.outer_step.losses_before.clear()
            if self.memory_plan.halvings:
                logs["out_of_memory"] = self.memory_plan.halvings
        super().log(logs, start_time)

    def _pictures(self) -> dict[str, Any]:
        """For trackers: the learned rates, and how held-out tasks fared in the last evaluation."""
        rule, weights, pictures = self.args.inner_rule(), self.loss_fn.weights.parameters(), {}
        if rule.learn_rates:
            names = rule.fast_names(weights)
            sizes = [weights[name].numel() for name in names]
            pictures = rate_pictures(names, sizes, self.rates.log_rates.detach().cpu())
        if self._held_out is not None:
            pictures["held_out_tasks"] = adaptation_picture(*self._held_out[1:])
        return pictures

    def _curves(self) -> dict[str, float]:
        return {} if self._held_out is None else task_curves(*self._held_out)

    # ---- saving

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; afterwards the model carries what `meta_peft.adapt` needs.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or True for the newest whole one in `output_dir`. A job that its
                launcher started again resumes by itself, from its own newest one.

        Raises:
            MetaPeftError: another run trains in `output_dir` now; there is no such checkpoint, or it is damaged; or too
                many updates had to be skipped.
        """
        folder = Path(str(self.args.output_dir))
        with Claim(folder) as claim:
            group.of_first(claim.take)
            again = attempt() if self.in_parts else None
            resume = partial(checkpoints.to_resume, resume_from_checkpoint, folder, attempt=again)
            found = group.of_first(resume)
            same_everywhere(self._trained())
            if found is None and self.train_dataset is not None:
                self.train_dataset.sampling.begin(self._losses_before)
            self.interrupted, self._failure, self._skipped = None, None, 0
            self.run_log = RunLog()
            with StopSignal() as self._signal:
                result = super().train(found and str(found), *args, **kwargs)
        self.attach()
        if self._failure is not None:
            raise self._failure
        self.interrupted = max((s for s in group.gathered_objects(self._signal.received) if s), default=None)
        return result

    def train_whole(self) -> None:
        """`train`, for what is worth nothing in part, such as a baseline: a signal that ends it early ends the program too.

        It leaves no checkpoint then, and a job that is started again does not go on from one: those in `output_dir` may be
        of the run that this is the baseline of.

        Raises:
            SystemExit: a signal came, with its exit code.
        """
        self.in_parts = False
        self.train()
        if self.interrupted is not None:
            raise SystemExit(128 + self.interrupted)

    def attach(self) -> None:
        self.adapter_record.attach()

    def record(self, *, rate_factors: dict[int, float] | None = None, results: CardResults | None = None) -> None:
        """Keep what an evaluation found: rate factors for `adapt`, and what the model card shows."""
        if rate_factors:
            self.adapter_record.rate_factors = {steps: factor for steps, factor in rate_factors.items() if steps}
        self.adapter_record.results = results or self.adapter_record.results
        self.attach()

    def sidecar(self) -> Sidecar:
        return self.adapter_record.sidecar()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            repo_id = getattr(self, "hub_model_id", None) or self.args.hub_model_id
            self.adapter_record.save(output_dir or str(self.args.output_dir), repo_id)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written with the adapter (see `_save`)."""

    # ---- what a checkpoint holds

    def _trained(self) -> list[Tensor]:
        return [*self.loss_fn.weights.parameters().values(), self.rates.log_rates]

    def _made_by(self) -> dict[str, str]:
        tasks = self.train_dataset.tasks
        size = f"{len(tasks)} of {len(tasks.dataset)} rows"
        return {**super()._made_by(), "algorithm": self.args.algorithm, "training tasks": size}

    def _progress(self) -> dict[str, Any]:
        return {
            "memory_plan": self.memory_plan.state(),
            "skipped": self._skipped,
            "sampling": self.train_dataset.sampling.state(),
        }

    def _go_on(self, progress: dict[str, Any]) -> None:
        self.memory_plan.restore(progress["memory_plan"], self.args.device)
        self._skipped = progress["skipped"]
        if "sampling" in progress:  # checkpoints from before there was a choice have none
            self.train_dataset.sampling.restore(progress["sampling"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.adapter_record.restore(Path(resume_from_checkpoint))
