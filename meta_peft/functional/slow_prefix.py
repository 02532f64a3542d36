"""What lies below the first fast weight, run once for all inner steps.

With some LoRA matrices or a classification head alone as fast weights (`InnerRule.fast`; the head alone is ANIL, Raghu et
al. 2020, arXiv 1909.09157), inner steps change nothing below the first of them. What comes out there, h, is one more
thing that losses depend on and no step moves. An algorithm gets h in place of the slow weights that it was computed with,
and gives its gradient h', which one backward pass takes to them: ``dL / d slow = h' dh / d slow``. This is the chain rule,
so results are the same, and an inner step costs what lies above h.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from meta_peft.frozen.prefix import Prefix, layers_of
from meta_peft.functional.task_rows import RowsRearrangedError
from meta_peft.lora.fast_weights import is_lora
from meta_peft.params import leaves
from meta_peft.types import Algorithm, EpisodeBatch, LossFn, Meta, MetaGradient, Params, Rows

BEHIND_ALL_LAYERS = (".pooler.", ".cls.", ".lm_head.", ".vocab_transform.")  # parts of names


class Model(Protocol):
    """What is asked of an `AdapterLoss`."""

    def own(self) -> Params:
        """The adapter's own values."""

    def apart(self, reason: RowsRearrangedError) -> None:
        """Have the tasks of a stack go through the model one after the other, from now on."""

    def within(
        self, inside: AbstractContextManager[None], adapter: Params, rows: Rows, *, second_order: bool
    ) -> Tensor:
        """The losses of all tasks at once, computed inside a context."""


class _Reached(NamedTuple):
    """What the modules below return for some rows, flat: a name where a tensor has a gradient, else the value."""

    flat: list[Any]
    form: TreeSpec


class AboveSlow:
    """``(adapter, rows) -> loss_T``, for rows that `reach` has seen. Weights below are not looked at."""

    def __init__(self, model: Model, prefix: Prefix, below: Iterable[str]):
        self.model, self._prefix, self.below = model, prefix, frozenset(below)
        self._reached: dict[Rows, _Reached] = {}

    def reach(self, slow: Params, rows: Rows) -> Params:
        """Run what lies below with the weights `slow`, and give what comes out of it as far as it has a gradient."""
        known: dict[int, Any] = {}
        self.model.within(self._prefix.noted(known), {**self.model.own(), **slow}, rows, second_order=False)
        flat, form = tree_flatten(known)
        given = {
            f"{len(self._reached)}.{i}": value
            for i, value in enumerate(flat)
            if isinstance(value, Tensor) and value.requires_grad
        }
        names = {id(value): name for name, value in given.items()}
        self._reached[rows] = _Reached([names.get(id(value), value) for value in flat], form)
        return given

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        flat, form = self._reached[rows]
        known = tree_unflatten([adapter[v] if isinstance(v, str) else v for v in flat], form)
        own = self.model.own()
        weights = {name: own[name] if name in self.below else adapter[name] for name in own}
        return self.model.within(self._prefix.noted(known), weights, rows, second_order=True)


def below_first(model: Any, weights: Iterable[str], fast: tuple[str, ...]) -> tuple[Prefix, tuple[str, ...]]:
    """What a `PeftModel` runs before the first of the weights called `fast`, and which others of `weights` it has.

    None, if it is not known of each whether it lies there.
    """
    base = model.get_base_model()
    prefix = Prefix(model, base.config.model_type, [name for name in fast if is_lora(name)])
    paths = {module: f"{path}." for path, module in model.named_modules()}
    starts = tuple(paths[module] for module in prefix.modules())
    in_order = tuple(paths[m] for m in (*layers_of(base), base.get_output_embeddings()) if m in paths)
    slow = [name for name in weights if name not in fast and is_lora(name)]
    below = tuple(name for name in slow if name.startswith(starts))
    above = [n for n in slow if n.startswith(in_order) or any(part in n for part in BEHIND_ALL_LAYERS)]
    elsewhere = set(slow) - {*below, *above}  # an embedding comes before all layers, and is in none
    return prefix, () if elsewhere else below


def above_of(algorithm: Any, loss_fn: LossFn, adapter: Params) -> AboveSlow | None:
    """What `gradient_above` needs, if it saves anything: an algorithm with inner steps that leave something below alone."""
    rule = algorithm.inner
    if rule.fast is None or not algorithm.adapts:
        return None
    above = getattr(loss_fn, "above", None)
    found: AboveSlow | None = above(tuple(rule.fast_names(adapter))) if above is not None else None
    return found


def held_below(loss_fn: LossFn, fast: Iterable[str], rows: Rows) -> AbstractContextManager[None]:
    """Inside, what lies below the weights called `fast` runs once for `rows`, if `loss_fn` knows what that is.

    For as long as the weights below stay as they are: in adaptation, and where its results are judged.
    """
    holding = getattr(loss_fn, "holding", None)
    held: AbstractContextManager[None] = nullcontext() if holding is None else holding(tuple(fast), rows)
    return held


def gradient_above(algorithm: Algorithm, above: AboveSlow, meta: Meta, batch: EpisodeBatch) -> MetaGradient:
    """What `algorithm` gives for the whole model, by way of its gradient of what reaches the fast weights."""
    slow = leaves({name: p for name, p in meta.adapter.items() if name in above.below})
    with torch.enable_grad():
        reached = {name: h for rows in (batch.support, batch.query) for name, h in above.reach(slow, rows).items()}
    rest = {name: p for name, p in meta.adapter.items() if name not in slow}
    found = algorithm(above, replace(meta, adapter=rest, given=leaves(reached)), batch)
    of_slow = torch.autograd.grad(
        list(reached.values()), list(slow.values()), [found.grads.given[name] for name in reached], allow_unused=True
    )
    adapter = {**found.grads.adapter}
    for (name, p), grad in zip(slow.items(), of_slow, strict=True):
        adapter[name] = torch.zeros_like(p) if grad is None else grad
    ordered = {name: adapter[name] for name in meta.adapter}
    return replace(found, grads=Meta(ordered, found.grads.hyper))
