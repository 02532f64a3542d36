"""Activation checkpointing inside an inner step: a layer's activations are computed again when backward needs them.

By then the fast weights are no longer in their layers. So what is computed again runs inside the same context as the
first time, which the caller gives: the same weights, the same forwards, the same attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Context = AbstractContextManager[None]
Forward = tuple[nn.Module, Callable[..., Any]]


def checkpointed(layers: Iterable[nn.Module], again: Callable[[], Callable[[], Context]]) -> Iterator[Forward]:
    """Forwards of `layers` that keep their inputs only.

    `again` is called when a layer runs the first time, and gives what makes the context to run in later.
    """
    for layer in layers:
        yield layer, partial(_forward, layer.forward, again)


def _forward(forward: Callable[..., Any], again: Callable[[], Callable[[], Context]], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn: dropout is off
        context_fn=lambda: (nullcontext(), _Repeatable(again())),
        **kwargs,
    )


class _Repeatable:
    """A context that can be entered again and again: second order computes a layer more than once."""

    def __init__(self, make: Callable[[], Context]):
        self._make = make
        self._entered: list[Context] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)
