"""What the layers below the adapter return, kept for each row over a whole run.

A row is drawn again and again: in other episodes, by other starts, at other rates. What comes out below the lowest
adapted layer is the same each time, as a row's positions see no other row and nothing that its end is padded with. So
with LoRA on upper layers most of a forward can be had from memory. Rows that meet for the first time go through the
layers with others of their length, in other stacks than they came in: results are the same to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from meta_peft.types import Rows

logger = logging.getLogger("meta_peft")

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
PART = 16  # rows that go through the layers together; of short texts, half of a larger stack would be padding


class FrozenCache:
    """Outputs ``[tokens, H]`` by row, up to so many bytes.

    One cache serves any number of models, as long as they are copies of one base in one precision.
    """

    def __init__(self, n_bytes: float):
        self.room = n_bytes
        self._known: dict[tuple[int, bytes], Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, rows: Rows, n_layers: int, run: Callable[[Rows], Any]) -> Tensor | None:
        """What the lowest `n_layers` layers return for `rows`, ``[B, L, H]``, zero where a row is padded.

        Args:
            run: gives that for rows which are not known yet.

        Returns:
            None where it cannot be told row by row: inputs that are no tokens, padding in front of them, outputs that are
            no such tensor.
        """
        if (length_B := _lengths(rows)) is None:
            return None
        keys = [(n_layers, digest) for digest in _digests(rows, length_B)]
        new = {key: b for b, key in enumerate(keys) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        by_length = sorted(new, key=lambda key: length_B[new[key]])
        for part in (by_length[i : i + PART] for i in range(0, len(by_length), PART)):
            some = _some(rows, [new[key] for key in part], length_B[new[part[-1]]])
            fresh_NLH = run(some)
            if not isinstance(fresh_NLH, Tensor) or fresh_NLH.shape[:-1] != some.inputs[IDS].shape:
                return None
            for key, fresh_LH in zip(part, fresh_NLH, strict=True):
                found[key] = fresh_LH[: length_B[new[key]]].clone()
                self._keep(key, found[key])
        length = rows.inputs[IDS].shape[1]  # a part of a stack may be padded beyond its longest row
        return torch.stack([pad(found[key], (0, 0, 0, length - len(found[key]))) for key in keys])

    def _keep(self, key: tuple[int, bytes], value: Tensor) -> None:
        if value.nbytes <= self.room:
            self.room -= value.nbytes
            self._known[key] = value
        elif self.room > 0:
            logger.info("The frozen cache is full: rows that come from now on run through all layers each time.")
            self.room = 0


def _lengths(rows: Rows) -> list[int] | None:
    """How many tokens each row has, if they are all that a model is given and begin where it begins."""
    ids_BL, mask_BL = rows.inputs.get(IDS), rows.inputs.get(MASK)
    if ids_BL is None or mask_BL is None or not {IDS, MASK, TYPES} >= set(rows.inputs):
        return None
    length_B = mask_BL.sum(1)
    in_front = torch.arange(ids_BL.shape[1], device=mask_BL.device) < length_B[:, None]
    return length_B.tolist() if torch.equal(in_front, mask_BL.bool()) else None


def _digests(rows: Rows, length_B: list[int]) -> list[bytes]:
    """All that a model is given of each row, and how many inputs that is."""
    given = torch.stack([rows.inputs[name] for name in (IDS, TYPES) if name in rows.inputs], 1).cpu().numpy()
    return [bytes([len(of_row)]) + of_row[:, :length].tobytes() for of_row, length in zip(given, length_B, strict=True)]


def _some(rows: Rows, which: list[int], longest: int) -> Rows:
    return Rows({name: t[which, :longest] for name, t in rows.inputs.items()}, rows.labels_BL[which], 1)
