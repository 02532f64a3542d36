"""Which positions of a batch hold tokens, so that products are computed at those alone.

Rows of one batch are padded to the longest. What a model computes at padded positions nothing reads: attention does not,
and no label is predicted there, which `objectives.fitting` sees to. Of short texts they are half of all positions, and
nearly all work is in products with frozen weights, which act on each position by itself. Results at the others are the same
to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MASK = "attention_mask"
WORTH = 0.9  # of the positions: with more tokens than that, picking them out costs as much as it saves


class TokenPositions:
    """For activations ``[B, L, H]``, the positions among ``B * L`` that hold tokens, ``[N]``, or None for all of them.

    Only on a CPU, where the time of a product goes with the number of its rows. None as well where it cannot be told:
    outside of `noted`, without a mask, with padding in front, or for activations of another shape than the mask's.

    What `last_layer_at` narrows may have that shape and other positions, each row's first ones filled: where padding is
    behind, a row has no more of them than tokens, so they are among those computed.
    """

    def __init__(self) -> None:
        self._now: _Places | None = None

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Forwards of `model` inside this context say by their mask where tokens are. Not for a model with two inputs."""

        def note(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
            self._now = _places(inputs.get(MASK))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._now = None

    def kept(self) -> Callable[[], AbstractContextManager[None]]:
        """What makes a context in which they are what they are now: for layers that are computed again."""
        return partial(self._back, self._now)

    @contextmanager
    def _back(self, then: _Places | None) -> Iterator[None]:
        before, self._now = self._now, then
        try:
            yield
        finally:
            self._now = before

    def __call__(self, x: Tensor) -> Tensor | None:
        return self._now.at if self._now is not None and x.dim() == 3 and x.shape[:2] == self._now.shape else None


class _Places(NamedTuple):
    shape: tuple[int, ...]
    at: Tensor


def _places(mask_BL: Any) -> _Places | None:
    if not isinstance(mask_BL, Tensor) or mask_BL.dim() != 2 or mask_BL.device.type != "cpu":
        return None
    there_BL = mask_BL.bool()
    in_front = torch.arange(mask_BL.shape[1]) < there_BL.sum(1, keepdim=True)
    if there_BL.sum() >= WORTH * there_BL.numel() or not torch.equal(there_BL, in_front):
        return None
    return _Places(tuple(mask_BL.shape), there_BL.flatten().nonzero().squeeze(1))
