"""Bytes of the tensors that are alive, now and at most, by what they are.

It counts what is asked for, to the byte: an allocator's rounding and buffers inside kernels are not seen. On the meta
device, where tensors have shapes and no values, it counts what the same code would take with values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meta_peft.estimate.known_shapes import KnownShapes, tensors

_run = KnownShapes()  # the same for all: shapes do not depend on who counts


class LiveMemory(TorchDispatchMode):
    """While active, storages that are made count until they are freed.

    Args:
        kind: what a new tensor is, from the operation, its tensor arguments and the tensor.
        apart: kinds that `without` leaves out.

    `fullest` holds bytes by kind at the moment when they were the most in sum, `without` at the moment when those of all
    kinds but `apart` were.
    """

    def __init__(self, kind: Callable[[Any, list[Tensor], Tensor], str] = lambda *_: "", apart: tuple[str, ...] = ()):
        super().__init__()
        self.now = 0
        self.fullest: Counter[str] = Counter()
        self.without: Counter[str] = Counter()
        self._most = [0, 0]
        self._apart = apart
        self._by_kind: Counter[str] = Counter()
        self._kind = kind
        self._known: dict[int, finalize[..., Any]] = {}
        self._attention = _attention_as_a_kernel()

    def __enter__(self) -> LiveMemory:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(None, None, None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        if any(t.device.type == "meta" for t in given):
            if function is torch.ops.aten._local_scalar_dense.default and given[0].dtype == torch.bool:
                return True  # transformers asks whether no row is padded: none is
            if any(t.device.type == "cpu" for t in given):  # labels have values; among those that have none, shapes do
                args, kwargs = _without_values(args), _without_values(kwargs)
        result = _run(function, args, kwargs)
        for tensor in tensors(result):
            self._count(function, given, tensor)
        return result

    def _count(self, function: Any, given: list[Tensor], tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if (
            key in self._known
            or any(key == t.untyped_storage()._cdata for t in given)
            or isinstance(tensor, nn.Parameter)
        ):
            return
        kind = self._kind(function, given, tensor)
        self._known[key] = finalize(storage, self._free, key, size, kind)
        self.now += size
        self._by_kind[kind] += size
        if self.now > self._most[0]:
            self._most[0], self.fullest = self.now, self._by_kind.copy()
        rest = self.now - sum(self._by_kind[name] for name in self._apart)
        if rest > self._most[1]:
            self._most[1], self.without = rest, self._by_kind.copy()

    def _free(self, key: int, size: int, kind: str) -> None:
        del self._known[key]
        self.now -= size
        self._by_kind[kind] -= size


@contextmanager
def _attention_as_a_kernel() -> Iterator[None]:
    """Attention on the meta device as one kernel, which keeps no scores, where a device would be given one.

    Torch chooses by device, and for one without values takes matrix products.
    """
    own = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kernel = query.device.type == "meta" and torch._C._get_flash_sdp_enabled()
        output: Tensor = (_fused if kernel else own)(query, *args, **kwargs)
        return output

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, _ = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    return output


def _without_values(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.to("meta")
    if isinstance(values, (tuple, list)):
        return type(values)(_without_values(value) for value in values)
    if isinstance(values, dict):
        return {name: _without_values(value) for name, value in values.items()}
    return values
