"""The loss of an adapter on rows: a PEFT model, bound once, as a function of LoRA weights alone.

This is where everything that a forward of the frozen model needs comes together: the fast weights in their layers, the
frozen products, the layers below the adapter run once, logits at labelled positions only, attention that can be
differentiated twice. Outside a call the model is an ordinary PEFT model, as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_peft import preflight
from meta_peft.fast_forwards import fast_forwards
from meta_peft.fast_weights import FastWeights
from meta_peft.forwards import replaced_forwards
from meta_peft.frozen_prefix import FrozenPrefix
from meta_peft.objectives import causal_lm
from meta_peft.types import Params, Rows


class AdapterLoss:
    """``(adapter, rows) -> loss_T`` for one adapter of a PEFT model.

    Args:
        model: a `PeftModel` with LoRA layers and a language-modelling head; its base is never written to.
        second_order: whether losses will be differentiated twice. Then attention runs as ordinary matrix products.

    Raises:
        MetaPeftError: the model is one whose gradients would be wrong without an error (see `preflight`).
    """

    def __init__(self, model: PeftModel, *, second_order: bool = True):
        preflight.check_model(model, second_order=second_order)
        self.model = model
        self.second_order = second_order
        self.weights = FastWeights(model)
        base = model.get_base_model()
        self._head = base.get_output_embeddings()
        self._fast = fast_forwards(model, self.weights.adapter)
        self._prefix = FrozenPrefix(model, base.config.model_type, list(self.weights.parameters()))

    def __call__(self, adapter: Params, rows: Rows) -> Tensor:
        with self._running(adapter, rows):
            return causal_lm.loss_per_task(self.model, self._head, rows)

    @torch.no_grad()
    def scores(self, adapter: Params, rows: Rows) -> causal_lm.TaskScores:
        """Loss and exact match per task, without gradients."""
        with self._running(adapter, rows):
            return causal_lm.scores_per_task(self.model, self._head, rows)

    def layers(self) -> tuple[int, int]:
        """How many decoder layers the model has, and how many of them are run once per stack instead of at every step."""
        return int(self.model.get_base_model().config.num_hidden_layers), len(self._prefix.below)

    @contextmanager
    def _running(self, adapter: Params, rows: Rows) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_evaluation_mode(self.model))
            stack.enter_context(self.weights.installed(adapter))
            stack.enter_context(replaced_forwards(self._fast))
            stack.enter_context(self._prefix.reused(rows))
            if self.second_order and torch.is_grad_enabled():
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


@contextmanager
def _evaluation_mode(model: PeftModel) -> Iterator[None]:
    """No dropout and no activation checkpointing: the loss is a function of the adapter, the same at every call.

    Checkpointing would recompute activations during backward, when the fast weights are no longer in their layers.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
