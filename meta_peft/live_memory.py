"""Bytes of the tensors that are alive, now and at most, by what they are.

It counts what is asked for, to the byte: an allocator's rounding and buffers inside kernels are not seen. On the meta
device, where tensors have shapes and no values, it counts what the same code would take with values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode


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

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if any(t.device.type == "meta" for t in given):
            if function is torch.ops.aten._local_scalar_dense.default and given[0].dtype == torch.bool:
                return True  # transformers asks whether no row is padded: none is
            if function is torch.ops.aten._fused_sdp_choice.default:  # a kernel, where a device would be given one
                return (SDPBackend.FLASH_ATTENTION if torch._C._get_flash_sdp_enabled() else SDPBackend.MATH).value
            if any(t.device.type == "cpu" for t in given):  # labels have values; among those that have none, shapes do
                args, kwargs = _without_values(args), _without_values(kwargs)
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
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


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _without_values(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.to("meta")
    if isinstance(values, (tuple, list)):
        return type(values)(_without_values(value) for value in values)
    if isinstance(values, dict):
        return {name: _without_values(value) for name, value in values.items()}
    return values
