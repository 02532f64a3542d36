"""The meta-gradient of a PEFT model on a batch of episodes: the one call that one's own training loop needs."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import nullcontext
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from meta_peft import preflight
from meta_peft.algorithms import MAML
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.slow_prefix import above_of, gradient_above
from meta_peft.functional.task_rows import RowsRearrangedError
from meta_peft.inner_optimizers.rule import RATES, InnerRule
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.outer_loop.memory_plan import MemoryPlan
from meta_peft.outer_loop.schedule import AnyAlgorithm
from meta_peft.params import weighted_sum
from meta_peft.types import Algorithm, EpisodeBatch, LossFn, Meta, MetaGradient, Params
from meta_peft.utils.memory import or_out_of_memory


class LearnedRates(nn.Module):
    """The inner loop's log learning rates ``[S, n]``, as a module of their own to optimise and save.

    S is 1, or the number of inner steps with rates per step; n is the number of LoRA matrices. Their gradient is None
    unless the rule learns rates.
    """

    def __init__(self, inner: InnerRule, adapter: Params):
        super().__init__()
        self.log_rates = nn.Parameter(inner.initial_rates(adapter)[RATES], requires_grad=inner.learn_rates)

    def values(self) -> Params:
        return {RATES: self.log_rates}


def meta_gradient(
    model: PeftModel | AdapterLoss,
    episode_batch: EpisodeBatch,
    algorithm: AnyAlgorithm,
    rates: LearnedRates | None = None,
    *,
    tasks_per_forward: int | MemoryPlan | None = None,
) -> MetaGradient:
    """The gradient of the mean objective over the episodes, for the adapter and for learned rates.

    Args:
        model: a `PeftModel`, or an `AdapterLoss` made from one to save its checks at every call.
        episode_batch: T episodes, on the model's device.
        algorithm: how the gradient is estimated.
        rates: the inner loop's rates; by default those of `algorithm.inner`.
        tasks_per_forward: how many tasks go through the model at once; None is all. A `MemoryPlan`, kept from call to
            call, chooses what fits. The result does not depend on it, and where memory runs out, fewer are tried.

    Returns:
        Gradients by the names of `AdapterLoss.weights`; nothing is written to `.grad` (see `assign_gradient`).
    """
    loss_fn = bind(model, algorithm)
    if not isinstance(tasks_per_forward, MemoryPlan):
        tasks_per_forward = MemoryPlan(tasks_per_forward, budget=math.inf)
    adapter: Params = dict(loss_fn.weights.parameters())
    hyper = algorithm.inner.initial_rates(adapter) if rates is None else rates.values()
    return in_chunks(algorithm, loss_fn, Meta(adapter, hyper), episode_batch, tasks_per_forward)


def bind(model: PeftModel | AdapterLoss, algorithm: AnyAlgorithm, *, checkpoint: bool = False) -> AdapterLoss:
    """The model's loss, checked for what `algorithm` asks of it."""
    loss_fn = model
    if not isinstance(loss_fn, AdapterLoss):
        loss_fn = AdapterLoss(loss_fn, second_order=algorithm.second_order, checkpoint=checkpoint)
    if algorithm.second_order and not loss_fn.second_order:
        raise MetaPeftError(
            "The algorithm takes second derivatives, but the AdapterLoss was made and checked for first ones only: make it"
            " with AdapterLoss(model, second_order=True)."
        )
    if getattr(algorithm, "memory", None) == "finite_differences":
        preflight.check_differences(loss_fn.model)
    return loss_fn


def in_chunks(
    algorithm: AnyAlgorithm, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch, plan: MemoryPlan
) -> MetaGradient:
    """The mean of the meta-gradients of the batch's chunks, each weighted by its number of tasks."""
    parts: list[MetaGradient] = []
    done, order = 0, None
    while done < batch.n_tasks:
        plan_found = or_out_of_memory(partial(plan.settle, algorithm, loss_fn, meta, batch))
        if isinstance(plan_found, BaseException):  # it measures a single task
            raise _nothing_fits(algorithm) from plan_found
        settled, size = plan_found
        if size < batch.n_tasks and order is None:
            batch, order = batch.by_length()
        chunk = batch.part(done, min(done + size, batch.n_tasks))
        with loss_fn.dense_copies(plan.spare) if isinstance(loss_fn, AdapterLoss) else nullcontext():
            part = or_out_of_memory(partial(_gradient, settled, loss_fn, meta, chunk))
        if not isinstance(part, BaseException):
            parts.append(part)
            done += chunk.n_tasks
        elif not plan.shrink(chunk.n_tasks):
            raise _nothing_fits(algorithm) from part
    shares = [part.n_tasks / batch.n_tasks for part in parts]
    grads = Meta(
        weighted_sum((share, part.grads.adapter) for share, part in zip(shares, parts, strict=True)),
        weighted_sum((share, part.grads.hyper) for share, part in zip(shares, parts, strict=True)),
    )
    metrics: dict[str, Tensor] = {n: torch.cat([part.metrics[n] for part in parts]) for n in parts[0].metrics}
    if order is not None:
        metrics = {name: values[order.argsort().to(values.device)] for name, values in metrics.items()}
    return MetaGradient(grads, batch.n_tasks, metrics)


def _gradient(algorithm: AnyAlgorithm, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
    """That of one chunk; what lies below the fast weights is run once, where it is known what that is."""
    if (above := above_of(algorithm, loss_fn, meta.adapter)) is not None:
        try:
            return gradient_above(algorithm, above, meta, batch)
        except RowsRearrangedError as reason:
            above.model.apart(reason)
    return algorithm(loss_fn, meta, batch)


def _nothing_fits(algorithm: Algorithm) -> MetaPeftError:
    keeps_graphs = (
        isinstance(algorithm, MAML) and algorithm.second_order and algorithm.memory not in ("auto", "replay", 0)
    )
    first = "Keep no graphs (memory='replay'), shorten" if keeps_graphs else "Shorten"
    return MetaPeftError(
        f"Memory ran out with a single task. {first} rows (max_length), take fewer of them, put LoRA on upper layers only,"
        " or use a first-order algorithm."
    )


def assign_gradient(
    gradient: MetaGradient,
    model: PeftModel | AdapterLoss,
    rates: LearnedRates | None = None,
    *,
    fixed: Collection[str] = (),
) -> None:
    """Write a meta-gradient to the `.grad` of the model's LoRA matrices and of `rates`, for any torch optimizer.

    The weights whose names are in `fixed` get none: inner steps move them, and they start where they are.
    """
    weights = model.weights if isinstance(model, AdapterLoss) else FastWeights(model)
    for name, parameter in weights.parameters().items():
        parameter.grad = None if name in fixed else gradient.grads.adapter[name]
    if rates is not None:
        rates.log_rates.grad = gradient.grads.hyper.get(RATES)  # none where the algorithm has no inner loop
