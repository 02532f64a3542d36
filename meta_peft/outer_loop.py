"""The meta-gradient of a PEFT model on a batch of episodes: the one call that one's own training loop needs."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn

from meta_peft.adapter_loss import AdapterLoss
from meta_peft.algorithms import MAML, MultiTask, Reptile
from meta_peft.errors import MetaPeftError
from meta_peft.fast_weights import FastWeights
from meta_peft.inner_optimizers.rule import RATES, InnerRule
from meta_peft.params import weighted_sum
from meta_peft.types import Algorithm, EpisodeBatch, LossFn, Meta, MetaGradient, Params


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
    algorithm: MAML | Reptile | MultiTask,
    rates: LearnedRates | None = None,
    *,
    tasks_per_forward: int | None = None,
) -> MetaGradient:
    """The gradient of the mean objective over the episodes, for the adapter and for learned rates.

    Args:
        model: a `PeftModel`, or an `AdapterLoss` made from one to save its checks at every call.
        episode_batch: T episodes, on the model's device.
        algorithm: how the gradient is estimated.
        rates: the inner loop's rates; by default those of `algorithm.inner`.
        tasks_per_forward: how many tasks go through the model at once; None is all. The result does not depend on it.

    Returns:
        Gradients by the names of `AdapterLoss.weights`; nothing is written to `.grad` (see `assign_gradient`).
    """
    loss_fn = model if isinstance(model, AdapterLoss) else AdapterLoss(model, second_order=algorithm.second_order)
    if algorithm.second_order and not loss_fn.second_order:
        raise MetaPeftError(
            "The algorithm takes second derivatives, but the AdapterLoss was made and checked for first ones only: make it"
            " with AdapterLoss(model, second_order=True)."
        )
    if tasks_per_forward is not None and tasks_per_forward < 1:
        raise MetaPeftError(f"tasks_per_forward must be 1 or more, or None for all; got {tasks_per_forward}.")
    adapter: Params = dict(loss_fn.weights.parameters())
    hyper = algorithm.inner.initial_rates(adapter) if rates is None else rates.values()
    return in_chunks(algorithm, loss_fn, Meta(adapter, hyper), episode_batch, tasks_per_forward)


def in_chunks(
    algorithm: Algorithm, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch, tasks_per_forward: int | None
) -> MetaGradient:
    """The mean of the meta-gradients of the batch's chunks, each weighted by its number of tasks."""
    parts = [algorithm(loss_fn, meta, chunk) for chunk in batch.chunks(tasks_per_forward)]
    shares = [part.n_tasks / batch.n_tasks for part in parts]
    grads = Meta(
        weighted_sum((share, part.grads.adapter) for share, part in zip(shares, parts, strict=True)),
        weighted_sum((share, part.grads.hyper) for share, part in zip(shares, parts, strict=True)),
    )
    metrics: dict[str, Tensor] = {n: torch.cat([part.metrics[n] for part in parts]) for n in parts[0].metrics}
    return MetaGradient(grads, batch.n_tasks, metrics)


def assign_gradient(gradient: MetaGradient, model: PeftModel | AdapterLoss, rates: LearnedRates | None = None) -> None:
    """Write a meta-gradient to the `.grad` of the model's LoRA matrices and of `rates`, for any torch optimizer."""
    weights = model.weights if isinstance(model, AdapterLoss) else FastWeights(model)
    for name, parameter in weights.parameters().items():
        parameter.grad = gradient.grads.adapter[name]
    if rates is not None and RATES in gradient.grads.hyper:
        rates.log_rates.grad = gradient.grads.hyper[RATES]
