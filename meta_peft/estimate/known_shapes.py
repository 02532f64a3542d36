"""Operations on tensors without values, worked out once for arguments that are alike.

On the meta device torch works out in Python what most operations return, which takes a third of a millisecond each. A model
has few kinds of them and runs each one many times.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
BY_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class _UnknownError(Exception):
    """Arguments, or a result, that say not all that matters."""


class KnownShapes:
    """Runs operations; of those on the meta device, what one returned for arguments of the same shapes is made anew.

    Only where it is new: an operation that writes to its arguments, or returns views of them, runs each time, as does one
    whose result has a shape that depends on values.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Callable[[], Any] | None] = {}  # None: what has memory in common with something

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_new(function):
            return function(*args, **kwargs)
        try:
            given = _like(args), tuple((name, _like(value)) for name, value in kwargs.items())
        except _UnknownError:
            return function(*args, **kwargs)
        key = function, torch.get_default_dtype(), given  # the dtype of an integer tensor times 0.5
        if (again := self._known.get(key)) is not None:
            return again()
        result = function(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _again(result, _storages((args, kwargs)))
        return result


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))


@cache
def _is_new(function: Any) -> bool:
    """Whether what `function` returns is by its schema nothing but new, and follows from shapes."""
    if not isinstance(function, OpOverload) or any(tag in function.tags for tag in BY_VALUES):
        return False
    schema = function._schema
    return not schema.is_mutable and all(returned.alias_info is None for returned in schema.returns)


def _like(value: Any) -> Hashable:
    """Equal for values for which an operation returns the same shapes."""
    kind = type(value)
    if kind in (Tensor, nn.Parameter):
        if value.device.type != "meta":
            raise _UnknownError
        return value.dtype, value.shape, value.stride()
    if kind in (tuple, list):
        return kind, tuple(map(_like, value))
    if kind not in CONSTANTS:
        raise _UnknownError
    return kind, value  # 1, 1.0 and True are equal, and not alike


def _storages(values: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors(values)}


def _again(result: Any, given: set[int]) -> Callable[[], Any] | None:
    """What makes the like of `result`; None if that has memory in common with something."""
    try:
        return _maker(result, given)
    except _UnknownError:
        return None


def _maker(result: Any, taken: set[int]) -> Callable[[], Any]:
    if type(result) in (tuple, list):
        kind, parts = type(result), [_maker(part, taken) for part in result]
        return lambda: kind(part() for part in parts)
    if type(result) in CONSTANTS:
        return lambda: result
    if type(result) is not Tensor or result.device.type != "meta" or _storages(result) & taken:
        raise _UnknownError
    taken |= _storages(result)
    size, stride, dtype = result.shape, result.stride(), result.dtype

    def make() -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    if make().untyped_storage().nbytes() != result.untyped_storage().nbytes():
        raise _UnknownError
    return make
