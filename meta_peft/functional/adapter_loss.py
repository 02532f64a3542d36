"""The loss of an adapter on rows: a PEFT model, bound once, as a function of LoRA weights alone.

This is where everything that a forward of the frozen model needs comes together: the fast weights in their layers, the
frozen products, the layers below the adapter run once, logits at labelled positions only, attention that can be
differentiated twice. Outside a call the model is an ordinary PEFT model, as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from meta_peft import preflight
from meta_peft.errors import MetaPeftError
from meta_peft.frozen.cache import FrozenCache
from meta_peft.frozen.linear import dense_copies, quantised_layers
from meta_peft.frozen.prefix import ONE_INPUT, PLAIN_STACKS, FrozenPrefix, Prefix, detached, layers_of
from meta_peft.frozen.shared_prompt import SharedPrompt, reads_on
from meta_peft.frozen.whole_weights import is_elsewhere
from meta_peft.functional.checkpointing import checkpointed
from meta_peft.functional.fast_attention import twice_differentiable_attention
from meta_peft.functional.fast_forwards import fast_forwards
from meta_peft.functional.model_modes import configs_of, evaluation_mode, outputs_by_name
from meta_peft.functional.padding import TokenPositions
from meta_peft.functional.row_checks import RowChecks
from meta_peft.functional.slow_prefix import AboveSlow, below_first
from meta_peft.functional.task_rows import RowsRearrangedError, TasksApart, rows_in_place
from meta_peft.inner_optimizers import InnerRule
from meta_peft.lora.fast_weights import FastWeights, alone_active, head_modules, is_lora, lora_layers
from meta_peft.objectives import head_of, known_labels, objective_for, objective_name
from meta_peft.objectives.labelled_tokens import TaskScores, without_cache
from meta_peft.ops.lora_linear import is_plain
from meta_peft.types import Params, Rows, Stack
from meta_peft.utils.forwards import replaced_forwards
from meta_peft.utils.memory import available
from meta_peft.utils.say_once import say_once

Measured = TypeVar("Measured")
ROOM = 0.25  # of the memory that is left


class AdapterLoss:
    """``(adapter, rows) -> loss_T`` for one adapter of a PEFT model.

    All tasks of a stack go through the model at once. Where an architecture or a place of LoRA does not allow that, they
    go one after the other, with the same results: this is found out at the first call and said in the log.

    Args:
        model: a `PeftModel` with LoRA layers and a head, over words or over classes; its base is never written to.
        second_order: whether losses will be differentiated twice. Then attention runs as ordinary matrix products.
        objective: a name of `meta_peft.objectives.OBJECTIVES`; by default what the model is made for.
        checkpoint: whether backward computes each layer's activations again instead of keeping them. Exact, also in
            second order.
        adapter: the name of the adapter; by default the active one. Which one is active later on makes no difference.

    Raises:
        MetaPeftError: the model is one whose gradients would be wrong without an error (see `preflight`).
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        second_order: bool = True,
        objective: str | None = None,
        checkpoint: bool = False,
        adapter: str | None = None,
    ):
        preflight.check_model(model, second_order=second_order, adapter=adapter)
        self.model = model
        self.second_order = second_order
        self.weights = FastWeights(model, adapter)
        self._base = base = model.get_base_model()  # PEFT's own wrapper would want inputs of certain names
        self.objective = objective_name(base) if objective is None else objective
        self._objective = objective_for(base, objective)
        self._head = head_of(base)
        self._configs = configs_of(base)
        adapter = self.weights.adapter
        self._positions = TokenPositions()
        self._one_input = base.config.model_type in ONE_INPUT
        self._check = RowChecks(base, self._objective, known_labels(base, self.objective))
        self._forwards = fast_forwards(model, adapter, self._positions)
        self._checkpoint = checkpoint
        below_head = [name for name in self.weights.parameters() if is_lora(name)]
        self._prefix = FrozenPrefix(model, base.config.model_type, below_head)
        self._slow_prefixes: dict[tuple[str, ...], tuple[Prefix, tuple[str, ...]]] = {}
        self._cache: FrozenCache | None = None
        self._behind: SharedPrompt | None = None
        self._held: dict[Rows, Callable[[], AbstractContextManager[None]]] = {}
        self._lora, heads = list(lora_layers(model, adapter)), list(head_modules(model, adapter))
        self._adapted: list[tuple[str, nn.Module]] = [*self._lora, *heads]
        self._pooled = frozenset([p for p, layer in self._lora if is_plain(layer, adapter)] + [p for p, _ in heads])
        self._at_once = all(map(_is_stackable, (head for _, head in heads)))
        self._in_order = {path for path, _ in self._adapted} if base.config.model_type in PLAIN_STACKS else set()
        self._apart = TasksApart()

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        self._check.labels(rows)
        losses = self._measured(lambda r: self._objective.loss_per_task(self._base, self._head, r), adapter, rows)
        return torch.cat(losses)

    @torch.no_grad()
    def scores(self, adapter: Params, rows: Rows) -> TaskScores:
        """Losses, matches and predictions, without gradients."""
        self._check.labels(rows)
        parts = self._measured(lambda r: self._objective.scores_per_task(self._base, self._head, r), adapter, rows)
        return TaskScores(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.no_grad()
    def log_likelihoods(self, adapter: Params, rows: Rows) -> tuple[Tensor, Tensor]:
        """Each row's summed log-likelihood of its labels, and how many they are, ``[B]`` each."""
        self._check.labels(rows)
        measure = self._objective.log_likelihood_per_row
        parts = self._measured(lambda r: measure(self._base, self._head, r), adapter, rows)
        total_B, count_B = (torch.cat(values) for values in zip(*parts, strict=True))
        return total_B, count_B

    @torch.no_grad()
    def with_model(self, use: Callable[[Any, Rows], Measured], adapter: Params, rows: Rows) -> list[Measured]:
        """What `use(model, rows)` returns for all tasks at once, or for each in turn, while the adapter is in its layers.

        `model` is the base model, LoRA layers included. It may run it as often as it likes, on inputs made of those of the
        rows, as many rows in the same order.
        """
        assert self._behind is None, "what is run here may have a prompt of its own"
        return self._measured(lambda r: use(self._base, r), adapter, rows, all_layers=True)

    @property
    def causal(self) -> bool:
        """Whether the model writes on where a row ends, so that its own answer can stand behind a prompt."""
        return self.objective == "causal_lm"

    @property
    def reads_on(self) -> bool:
        """Whether `behind` can be had."""
        return self.causal and reads_on(self._base)

    @contextmanager
    def behind(self, tokens: Sequence[int], adapter: Params) -> Iterator[None]:
        """Inside this context rows are what comes after the same tokens, which the model reads once, with this adapter.

        For scores and likelihoods at the same weights, without gradients. A row's first label needs a token of the row in
        front of it. No tokens change nothing.
        """
        if tokens:
            own = self.weights.parameters()
            assert all(value.dim() == own[name].dim() for name, value in adapter.items()), "a prompt is for one task"
            self._check.length(len(tokens))
            with self._forwards_in_place(adapter, False):
                self._behind = SharedPrompt(self._base, tokens, next(iter(adapter.values())).device)
        try:
            yield
        finally:
            self._behind = None

    def dense_copies(self, n_bytes: float) -> AbstractContextManager[None]:
        """Inside this context dequantised copies of weights that every inner step needs are kept, up to `n_bytes`."""
        once = {id(module) for lower in self._prefix.modules() for module in lower.modules()}
        return dense_copies((layer for layer in quantised_layers(self._base) if id(layer) not in once), n_bytes)

    def dense_copies_where_room(self) -> AbstractContextManager[None]:
        """The same, up to a quarter of the memory that is left: for adaptation and evaluation, which keep little else."""
        device = next(iter(self.weights.parameters().values())).device
        return self.dense_copies(ROOM * available(device))

    def own(self) -> Params:
        """The adapter's own values, detached."""
        return {name: p.detach() for name, p in self.weights.parameters().items()}

    def keep_frozen(self, cache: FrozenCache) -> None:
        """From now on rows that are in `cache` skip the layers below the adapter, and others get into it.

        Raises:
            MetaPeftError: parts of the base are in shards, in main memory or on disk.
        """
        if any(map(is_elsewhere, self._base.modules())):
            raise MetaPeftError(
                "frozen_cache_gb keeps what the layers of a base return that is whole on its device; this one is in shards,"
                " in main memory or on disk. Leave frozen_cache_gb out."
            )
        if not self._prefix.n_layers:
            say_once("frozen_cache_gb keeps nothing here: no whole layer lies below the adapter.")
        self._cache = cache

    def above(self, fast: tuple[str, ...]) -> AboveSlow | None:
        """The loss as a function of what reaches the weights called `fast`, if other weights of the adapter lie below."""
        prefix, below = self._below(fast)
        return AboveSlow(self, prefix, below) if below and self._at_once else None

    @contextmanager
    def holding(self, fast: tuple[str, ...], rows: Rows) -> Iterator[None]:
        """Inside this context what lies below the weights called `fast` runs once for `rows`, all tasks at once.

        The other weights must stay as they are for as long.
        """
        prefix, below = self._below(fast)
        if below and self._at_once:
            self._held[rows] = partial(prefix.noted, {}, detached)
        try:
            yield
        finally:
            self._held.pop(rows, None)

    def apart(self, reason: RowsRearrangedError) -> None:
        """From now on the tasks of a stack go through the model one after the other."""
        self._at_once = False
        say_once(f"{reason} The tasks of a stack go through the model one after the other.")

    def within(
        self, inside: AbstractContextManager[None], adapter: Params, rows: Rows, *, second_order: bool = True
    ) -> Tensor:
        """The losses of all tasks at once, computed inside a context.

        Raises:
            RowsRearrangedError: this model cannot have the tasks of a stack at once.
        """
        self._check.labels(rows)
        self._check.readable(rows)
        own = self.weights.parameters()
        at_once = any(value.dim() > own[name].dim() for name, value in adapter.items())
        with self._running(adapter, rows, at_once=at_once, second_order=second_order), inside:
            return self._objective.loss_per_task(self._base, self._head, rows)

    def stack(self, rule: InnerRule) -> Stack:
        """How many layers run how often for an inner loop by `rule`."""
        prefix, below = self._below(tuple(rule.fast_names(self.weights.parameters())))
        frozen = self._prefix.n_layers
        return Stack(len(layers_of(self._base)), frozen, prefix.n_layers - frozen if below and self._at_once else 0)

    def _below(self, fast: tuple[str, ...]) -> tuple[Prefix, tuple[str, ...]]:
        if fast not in self._slow_prefixes:
            self._slow_prefixes[fast] = below_first(self.model, self.weights.parameters(), fast)
        return self._slow_prefixes[fast]

    def _recalled(self, rows: Rows) -> Tensor | None:
        """What comes out below the adapter, if it is kept for all rows (see `frozen.cache`)."""

        def run(some: Rows) -> Any:
            return self._prefix.output(lambda: self._base(**some.inputs, **without_cache(self._base)))

        return None if self._cache is None else self._cache.of(rows, self._prefix.n_layers, run)

    def _measured(
        self, measure: Callable[[Rows], Measured], adapter: Params, rows: Rows, *, all_layers: bool = False
    ) -> list[Measured]:
        """What `measure` returns for all tasks at once, or for one after the other."""
        self._check.readable(rows, behind=0 if self._behind is None else self._behind.length)
        own = self.weights.parameters()
        stacked = {name for name, value in adapter.items() if value.dim() > own[name].dim()}
        if wrong := {len(adapter[name]) for name in stacked} - {rows.n_tasks}:
            raise MetaPeftError(f"The adapters of {wrong.pop()} tasks cannot be given rows of {rows.n_tasks}.")
        if not stacked or (self._at_once and rows.n_tasks > 1):
            try:
                with self._running(adapter, rows, at_once=bool(stacked), all_layers=all_layers):
                    return [measure(rows)]
            except RowsRearrangedError as reason:
                self.apart(reason)
        measured = []
        for task, its_rows in enumerate(self._apart.of(rows)):
            its_adapter = {name: value[task] if name in stacked else value for name, value in adapter.items()}
            with self._running(its_adapter, its_rows, at_once=False, all_layers=all_layers):
                measured.append(measure(its_rows))
        return measured

    @contextmanager
    def _running(
        self, adapter: Params, rows: Rows, *, at_once: bool, all_layers: bool = False, second_order: bool = True
    ) -> Iterator[None]:
        in_place = partial(self._forwards_in_place, adapter, self.second_order and second_order)
        with ExitStack() as stack:
            stack.enter_context(in_place())
            if self._one_input:
                stack.enter_context(self._positions.noted(self._base))
            if self._checkpoint:
                again = partial(self._as_now, in_place)
                stack.enter_context(replaced_forwards(checkpointed(layers_of(self._base), again)))
            if self._behind is not None:  # what is remembered of rows is of rows that stand for themselves
                stack.enter_context(replaced_forwards([(self._base, self._behind.forward)]))
            elif not all_layers:
                stack.enter_context(self._prefix.reused(rows, self._recalled))
                if rows in self._held:
                    stack.enter_context(self._held[rows]())
            if at_once:
                stack.enter_context(rows_in_place(self._adapted, rows.labels_BL.shape[0], self._pooled, self._in_order))
            yield

    def _as_now(
        self, in_place: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], AbstractContextManager[None]]:
        """What makes the context that a layer runs in, for when it is computed again."""
        kept = self._positions.kept()

        @contextmanager
        def made() -> Iterator[None]:
            with in_place(), kept():
                yield

        return made

    @contextmanager
    def _forwards_in_place(self, adapter: Params, second_order: bool) -> Iterator[None]:
        if torch.is_grad_enabled():
            preflight.check_autocast(next(iter(adapter.values())).device.type)
        preflight.check_still_there(self.model, self.weights.adapter, *self._lora[0])
        for path, layer in self._lora:
            preflight.check_in_use(path, layer)
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(outputs_by_name(self._configs))
            stack.enter_context(alone_active(self.model, self.weights.adapter))
            stack.enter_context(self.weights.installed(adapter))
            stack.enter_context(replaced_forwards(self._forwards))
            if second_order and torch.is_grad_enabled():
                stack.enter_context(twice_differentiable_attention())
            yield


def _is_stackable(head: nn.Module) -> bool:
    """Whether all weights of a head are those of linear layers, which take a stack of them."""
    return all(type(module) is nn.Linear for module in head.modules() if list(module.parameters(recurse=False)))
