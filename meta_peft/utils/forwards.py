"""Other forwards for some layers of a model, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Each layer runs the forward given with it inside this context.

    A forward of the instance's own, such as Accelerate puts there where layers are spread over devices, comes back.
    """
    forwards = list(forwards)
    own = [layer.__dict__.get("forward") for layer, _ in forwards]
    for layer, forward in forwards:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for (layer, _), was in zip(forwards, own, strict=True):
            del layer.__dict__["forward"]
            if was is not None:
                layer.__dict__["forward"] = was
