"""The border to PEFT: the LoRA matrices of an adapter as a flat dict, and forwards with other values in their place.

PEFT's own layers do the forward. For its duration the `nn.Linear` that holds a LoRA matrix takes its weight from the
dict it is given, ``[out, in]`` for weights that all rows share or ``[T, out, in]`` for a stack over tasks, so that T
tasks, each with its own weights, go through the frozen base model in one pass. The matrices of an embedding are bare
parameters, which PEFT multiplies itself: they cannot be stacked. The magnitudes of DoRA, ``[out]``, are fast weights too.

So is the head of a classifier, which PEFT copies for each adapter (`modules_to_save`): its matrices and its biases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from meta_peft.errors import MetaPeftError
from meta_peft.types import Params

# What PEFT puts into `modules_to_save` of a classifier: endings of names, so that DistilBERT's `pre_classifier` is one.
HEADS = ("classifier", "score")
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS")  # the task types of an adapter that PEFT gives a head to
CARRIERS = (LoraLayer, TrainableTokensLayer, AuxiliaryTrainingWrapper)  # each has a list of active adapters of its own
LAYER_NUMBER = re.compile(r"\.(\d+)\.")  # of the layer, in the name of what is in it


class FastWeights:
    """The LoRA matrices of one adapter of a `PeftModel`, and its classification head if it has one.

    Names are those that PEFT writes to ``adapter_model.safetensors``, so a dict of values is a state dict of the
    adapter. They are found by layer, never by `requires_grad`: what else an adapter may train (an embedding in
    `modules_to_save`, say) is no fast weight.
    """

    def __init__(self, model: PeftModel, adapter: str | None = None):
        self.adapter = adapter or active_adapter(model)
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for path, layer in lora_layers(model, self.adapter):
            for matrix in ("lora_A", "lora_B"):
                if self.adapter in getattr(layer, matrix):
                    self._places[f"{path}.{matrix}.weight"] = getattr(layer, matrix)[self.adapter], "weight"
            for matrix in ("lora_embedding_A", "lora_embedding_B"):
                if self.adapter in getattr(layer, matrix):
                    self._places[f"{path}.{matrix}"] = getattr(layer, matrix), self.adapter
            if self.adapter in layer.lora_magnitude_vector:
                self._places[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[self.adapter], "weight"
        if not self._places:
            raise MetaPeftError(
                f"The model has no LoRA layer with an adapter called {self.adapter!r}. Make one with"
                " peft.get_peft_model(model, LoraConfig(target_modules=...)) whose targets match layers of the model."
            )
        for path, head in head_modules(model, self.adapter):
            for name, _ in head.named_parameters():
                inside, _, attribute = name.rpartition(".")
                self._places[f"{path}.{name}"] = head.get_submodule(inside), attribute

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters, by name."""
        return {name: cast(nn.Parameter, getattr(*place)) for name, place in self._places.items()}

    def load_(self, values: Params) -> None:
        """Copy `values`, ``[out, in]`` each, into the model's own parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(values[name])

    @contextmanager
    def installed(self, values: Params) -> Iterator[None]:
        """Forwards of the model inside this context use `values`, and gradients flow to them."""
        places = {place: values[name] for name, place in self._places.items()}
        own = {(module, attribute): module._parameters[attribute] for module, attribute in places}
        in_heads = {id(module) for name, (module, _) in self._places.items() if not is_lora(name)}
        linears = [module for module, _ in places if type(module) is nn.Linear]
        try:
            for (module, attribute), value in places.items():
                module._parameters[attribute] = None
                module.__dict__[attribute] = value
            for linear in linears:
                _become(linear, _StackedHead if id(linear) in in_heads else _StackedLinear)
            yield
        finally:
            for (module, attribute), parameter in own.items():
                module.__dict__.pop(attribute, None)
                module._parameters[attribute] = parameter
            for linear in linears:
                _become(linear, nn.Linear)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """As by assignment, of which PyTorch asks each time whether it is a parameter, and there are hundreds in a forward."""
    object.__setattr__(module, "__class__", kind)


class _StackedLinear(nn.Linear):
    """`nn.Linear` whose weight may be a stack ``[T, out, in]``: rows ``[T * R, L, in]`` meet their own task's weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dim() == 2:
            return F.linear(x, weight, self.bias)
        n_tasks = weight.shape[0]
        if n_tasks == 1:
            return F.linear(x, weight[0], self.bias)
        if x.dim() != 3 or x.shape[0] % n_tasks:
            raise MetaPeftError(
                f"A stack of {n_tasks} tasks needs activations of shape [tasks * rows, tokens, features], but a LoRA"
                f" layer got {list(x.shape)}: this architecture rearranges rows. Set tasks_per_forward to 1."
            )
        flat = x.reshape(n_tasks, -1, x.shape[-1])
        return torch.bmm(flat, weight.transpose(1, 2)).view(*x.shape[:-1], -1)


class _StackedHead(nn.Linear):
    """`nn.Linear` whose weight and bias may be stacks; rows ``[T * R, in]`` or ``[T * R, L, in]`` meet their own task's."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        stacks = [p for p, shared in ((weight, 2), (bias, 1)) if p is not None and p.dim() > shared]
        if not stacks:
            return F.linear(x, weight, bias)
        y = x.reshape(len(stacks[0]), -1, x.shape[-1]) @ weight.transpose(-1, -2)
        if bias is not None:
            y = y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
        return y.view(*x.shape[:-1], -1)


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """All LoRA layers of `model` that carry `adapter`, with their paths, in the model's own order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            yield path, module


def head_modules(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """The classification heads of `model` that belong to `adapter`, with the paths that PEFT saves them by."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and path.endswith(HEADS) and adapter in module.modules_to_save:
            yield path, module.modules_to_save[adapter]


def is_lora(name: str) -> bool:
    """Whether this is the name of a LoRA matrix (or of the magnitudes of DoRA), not of a head's weight."""
    return "lora_" in name.removesuffix(".weight").rpartition(".")[2]


@contextmanager
def alone_active(model: PeftModel, adapter: str) -> Iterator[None]:
    """Inside this context PEFT's own forwards know `adapter` alone, whichever is the active one.

    Unlike `set_adapter` it leaves alone what requires a gradient.
    """
    if list(model.active_adapters) == [adapter]:
        yield
        return
    carry = [module for module in model.modules() if isinstance(module, CARRIERS)]
    was: list[Any] = [module._active_adapter for module in carry]
    try:
        for module in carry:
            module._active_adapter = [adapter] if _takes(module, adapter) else []
        yield
    finally:
        for module, names in zip(carry, was, strict=True):
            module._active_adapter = names


def _takes(module: nn.Module, adapter: str) -> bool:
    """Whether a module of PEFT may be told that `adapter` is active: one for LoRA may always."""
    if isinstance(module, LoraLayer):
        return True
    own = module.trainable_tokens_delta if isinstance(module, TrainableTokensLayer) else cast(Any, module)._adapters
    return adapter in own


def meta_learned_adapter(model: Any) -> str | None:
    """The name of the adapter that `model` carries as meta-learned, in ``model.meta_peft``; None if it carries none."""
    name: str | None = getattr(getattr(model, "meta_peft", None), "adapter", None)
    return name


def active_adapter(model: PeftModel) -> str:
    """The name of the one active adapter."""
    names = list(model.active_adapters)
    if len(names) != 1:
        raise MetaPeftError(
            f"Expected exactly one active adapter, the model has {names}: choose one with model.set_adapter(name)."
        )
    return names[0]
