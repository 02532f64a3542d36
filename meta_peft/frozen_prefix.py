"""The decoder layers below the first adapted one, run once per stack of rows instead of once per inner step.

What enters the first adapted layer is a constant of the inner loop: neither fast nor meta weights reach it. The first
forward of a `Rows` object remembers it; later forwards of the same object skip the layers below. This needs a list of
layers that hand on nothing but their hidden state, which holds for the model types in `PLAIN_STACKS`, each of them
tested; other models run all their layers each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from meta_peft.forwards import replaced_forwards
from meta_peft.types import Rows

PLAIN_STACKS = frozenset({"llama", "gpt2", "mistral", "qwen2", "qwen3"})


class FrozenPrefix:
    """Remembers, for each live `Rows`, the hidden state ``[B, L, H]`` that enters the first adapted layer."""

    def __init__(self, model: nn.Module, model_type: str, adapted: list[str]):
        layers = _decoder_layers(model, adapted) if model_type in PLAIN_STACKS else []
        first = next((i for i, (path, _) in enumerate(layers) if any(_below(path, name) for name in adapted)), 0)
        self.below: list[nn.Module] = [layer for _, layer in layers[:first]]
        self._first_adapted = layers[first][1] if self.below else None
        self._entering: WeakKeyDictionary[Rows, Tensor] = WeakKeyDictionary()

    @contextmanager
    def reused(self, rows: Rows) -> Iterator[None]:
        """A forward of `rows` inside this context skips what an earlier one has computed."""
        if self._first_adapted is None:
            yield
            return
        known = self._entering.get(rows)

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal known
            if known is None:
                known = (args[0] if args else kwargs["hidden_states"]).detach()
                self._entering[rows] = known
            if args:
                return (known, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": known}

        hook = self._first_adapted.register_forward_pre_hook(enter, with_kwargs=True)
        skipped = [] if known is None else self.below
        try:
            with replaced_forwards((layer, _hand_on) for layer in skipped):
                yield
        finally:
            hook.remove()


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _decoder_layers(model: nn.Module, adapted: list[str]) -> list[tuple[str, nn.Module]]:
    """The one list of layers that holds every adapted module, with paths; empty if there is none."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(_below(path, name) for name in adapted):
            return [(f"{path}.{i}", layer) for i, layer in enumerate(module)]
    return []


def _below(path: str, name: str) -> bool:
    return name.startswith(f"{path}.")
