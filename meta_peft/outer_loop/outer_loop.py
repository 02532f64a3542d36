"""The meta-gradient of a PEFT model on a batch of episodes: the one call that one's own training loop needs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch
from peft import PeftModel
from torch import Tensor, nn

from meta_peft import preflight
from meta_peft.algorithms import MAML
from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.slow_prefix import above_of, gradient_above
from meta_peft.functional.task_rows import RowsRearrangedError
from meta_peft.inner_optimizers.rule import RATES, InnerRule, check_rule
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.outer_loop.memory_plan import MemoryPlan
from meta_peft.outer_loop.schedule import AnyAlgorithm
from meta_peft.params import weighted_sum
from meta_peft.types import Algorithm, EpisodeBatch, LossFn, Meta, MetaGradient, Params
from meta_peft.utils.checked import shown
from meta_peft.utils.memory import or_out_of_memory


class LearnedRates(nn.Module):
    """The inner loop's log learning rates ``[S, n]``, as a module of their own to optimise and save.

    S is 1, or the number of inner steps with rates per step; n is the number of LoRA matrices. Their gradient is None
    unless the rule learns rates.

    Args:
        inner: the inner rule, that of the algorithm.
        adapter: the LoRA matrices by name, such as ``AdapterLoss(model).weights.parameters()``.
    """

    def __init__(self, inner: InnerRule, adapter: Params):
        super().__init__()
        check_rule(inner)
        if not isinstance(adapter, Mapping):
            raise MetaPeftError(
                f"adapter must be the LoRA matrices by name, AdapterLoss(model).weights.parameters(); got a"
                f" {type(adapter).__name__}."
            )
        self._columns = list(inner.rates_of_each(adapter).items())
        self.log_rates = nn.Parameter(inner.initial_rates(adapter)[RATES], requires_grad=inner.learn_rates)

    def values(self) -> Params:
        return {RATES: self.log_rates}

    def check(self, inner: InnerRule, adapter: Params) -> None:
        """Raise unless `inner` has the same rates, of the same weights, in this order: nothing else tells them apart."""
        for mine, asked in zip_longest(self._columns, inner.rates_of_each(adapter).items()):
            if mine != asked:
                raise MetaPeftError(
                    f"LearnedRates was made for another rule or another adapter: it has {_rates_of(mine)}, where the"
                    f" algorithm's rule has {_rates_of(asked)}. Make it with the same ones, as"
                    " LearnedRates(algorithm.inner, AdapterLoss(model).weights.parameters())."
                )


def _rates_of(column: tuple[str, int] | None) -> str:
    return "nothing" if column is None else f"{column[1]} of {column[0]}"


def _check_rates(rates: LearnedRates | None) -> None:
    if not (rates is None or isinstance(rates, LearnedRates)):
        raise MetaPeftError(
            f"rates must be a LearnedRates, or None; got a {type(rates).__name__}. Give the module itself, not the"
            " parameter or the values that it holds."
        )


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller runs in, as `adapt` does
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
        model: a `PeftModel`, whose active adapter is learned, or an `AdapterLoss` made from one, which has its own, to save
            checks at every call.
        episode_batch: T episodes, on the model's device.
        algorithm: how the gradient is estimated.
        rates: the inner loop's rates, made with `algorithm.inner`; by default those that it starts from.
        tasks_per_forward: how many tasks go through the model at once; None is all. A `MemoryPlan`, kept from call to
            call, chooses what fits. The result does not depend on it, and where memory runs out, fewer are tried.

    Returns:
        Gradients by the names of `AdapterLoss.weights`; nothing is written to `.grad` (see `assign_gradient`).

    Raises:
        MetaPeftError: gradients would be wrong (see `preflight`); the model carries a meta-learned adapter, and another one
            is active; or `rates` are those of other weights.
    """
    _check_rates(rates)
    if not isinstance(episode_batch, EpisodeBatch):
        raise MetaPeftError(
            f"episode_batch must be an EpisodeBatch, which EpisodeCollator makes of episodes, and"
            f" meta_peft.episode_batch of tensors; got a {type(episode_batch).__name__}."
        )
    loss_fn = bind(model, algorithm)
    if not isinstance(tasks_per_forward, MemoryPlan):
        tasks_per_forward = MemoryPlan(tasks_per_forward, budget=math.inf)
    adapter: Params = dict(loss_fn.weights.parameters())
    if rates is not None and algorithm.adapts:
        rates.check(algorithm.inner, adapter)
    hyper = algorithm.inner.initial_rates(adapter) if rates is None else rates.values()
    found = in_chunks(algorithm, loss_fn, Meta(adapter, hyper), episode_batch, tasks_per_forward)
    return replace(found, of_adapter=loss_fn.weights.adapter)


def bind(model: PeftModel | AdapterLoss, algorithm: AnyAlgorithm, *, checkpoint: bool = False) -> AdapterLoss:
    """The model's loss, checked for what `algorithm` asks of it."""
    loss_fn = model
    if not isinstance(loss_fn, AdapterLoss):
        loss_fn = AdapterLoss(loss_fn, second_order=algorithm.second_order, checkpoint=checkpoint)
        preflight.check_learned_is_active(loss_fn.model)
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

    A gradient of `meta_gradient` goes to the adapter that it is of, whichever of the model's is active by now.

    Args:
        fixed: names of weights that get none: inner steps move them, and they start where they are.

    Raises:
        MetaPeftError: the `AdapterLoss` is one of another adapter, `rates` are others, or `fixed` has what is no name.
    """
    weights = _weights_of(gradient, model).parameters()
    _check_names(fixed, weights)
    _check_rates(rates)
    of_rates = gradient.grads.hyper.get(RATES)  # none where the algorithm has no inner loop
    if rates is not None and of_rates is not None and of_rates.shape != rates.log_rates.shape:
        raise MetaPeftError(
            f"The gradient is of rates of shape {list(of_rates.shape)}, and LearnedRates holds some of shape"
            f" {list(rates.log_rates.shape)}: give meta_gradient and assign_gradient the same rates."
        )
    for name, parameter in weights.items():
        parameter.grad = None if name in fixed else gradient.grads.adapter[name]
    if rates is not None:
        rates.log_rates.grad = of_rates


def _weights_of(gradient: MetaGradient, model: PeftModel | AdapterLoss) -> FastWeights:
    """The weights that `gradient` is of. Those of two adapters have the same names, so nobody would notice a mistake."""
    if isinstance(model, AdapterLoss):
        if gradient.of_adapter not in (None, model.weights.adapter):
            raise MetaPeftError(
                f"The gradient is of the adapter {gradient.of_adapter!r}, and the AdapterLoss of"
                f" {model.weights.adapter!r}: give the one that meta_gradient was given."
            )
        return model.weights
    if gradient.of_adapter is None:
        preflight.check_learned_is_active(model)
    return FastWeights(model, gradient.of_adapter)


def _check_names(fixed: Collection[str], names: Collection[str]) -> None:
    if isinstance(fixed, str):
        raise MetaPeftError(f"fixed must be a set or a list of names of weights; got the text {shown(fixed)}.")
    for name in fixed:
        if name not in names:
            raise MetaPeftError(
                f"fixed has {shown(name)}, which is the name of no weight of the adapter.{did_you_mean(str(name), names)}"
                " AdapterLoss(model).weights.parameters() has them all."
            )
