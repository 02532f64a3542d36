"""What an operation on tensors without values returned once is made again, and only where that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload

from meta_peft.estimate.known_shapes import KnownShapes

aten = torch.ops.aten
X = torch.empty(3, 4, device="meta")


class Counted:
    """An operation that says how often it ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operation: Any):
        self.runs, run = 0, type(operation).__call__

        def counting(called: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.runs += called is operation
            return run(called, *args, **kwargs)

        monkeypatch.setattr(type(operation), "__call__", counting)


def operation_name(value: Any) -> str | None:
    return str(value) if isinstance(value, OpOverload) else None


def facts(result: Any) -> Any:
    if isinstance(result, Tensor):
        storage = result.untyped_storage().nbytes()
        return result.dtype, result.shape, result.stride(), storage, result.storage_offset(), result.device.type
    return [facts(part) for part in result] if isinstance(result, (tuple, list)) else result


@pytest.mark.parametrize(
    ("operation", "args", "kwargs"),
    [
        (aten.mul.Tensor, (X, X), {}),
        (aten.mul.Tensor, (X, 2.5), {}),
        (aten.add.Tensor, (X, torch.empty(4, device="meta", dtype=torch.bfloat16)), {"alpha": 2}),
        (aten.mul.Tensor, (X.t(), X.t()), {}),  # as the arguments lie, so does the result
        (aten.mm.default, (X, X.t()), {}),
        (aten.sum.dim_IntList, (X, [0], True), {}),
        (aten._to_copy.default, (X,), {"dtype": torch.float64}),
        (aten.eq.Tensor, (X, X), {}),
        (aten._softmax.default, (X, -1, False), {}),
        (aten.native_layer_norm.default, (X, [4], None, None, 1e-5), {}),
        (aten.max.dim, (X, 1), {}),
        (aten.cat.default, ([X, X], 1), {}),
    ],
    ids=operation_name,
)
def test_made_again(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    expected, counted, run = facts(operation(*args, **kwargs)), Counted(monkeypatch, operation), KnownShapes()
    results = [run(operation, args, kwargs) for _ in range(3)]
    assert counted.runs == 1
    assert [facts(result) for result in results] == [expected] * 3
    first, last = (result[0] if isinstance(result, (tuple, list)) else result for result in results[1:])
    assert first.untyped_storage()._cdata != last.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("operation", "make"),
    [
        (aten.view.default, lambda: (torch.empty(3, 4, device="meta"), [12])),  # a view
        (aten._unsafe_view.default, lambda: (torch.empty(3, 4, device="meta"), [12])),  # one that is not said to be
        (aten.add_.Tensor, lambda: (torch.empty(3, 4, device="meta"), X)),  # writes
        (aten.mul.Tensor, lambda: (torch.ones(3), torch.ones(3))),  # has values
        (aten._to_copy.default, lambda: (torch.ones(3),)),
        (aten.is_same_size.default, lambda: (torch.ones(3), X)),
    ],
    ids=operation_name,
)
def test_run_each_time(operation: Any, make: Callable[[], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch):
    counted, run = Counted(monkeypatch, operation), KnownShapes()
    for n in (1, 2, 3):
        args = make()
        result = run(operation, args, {})
        assert counted.runs == n
        if operation in (aten.view.default, aten._unsafe_view.default, aten.add_.Tensor):
            assert result.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def test_what_differs_is_asked_apart():
    run, integers = KnownShapes(), torch.empty(3, 4, device="meta", dtype=torch.int64)
    for other in (2, 2.0, True):  # which are not alike, although 1 == 1.0 == True
        assert run(aten.mul.Tensor, (integers, other), {}).dtype == (integers * other).dtype
    assert run(aten.mul.Tensor, (integers, 1.0), {}).dtype == torch.float32
    assert run(aten.mul.Tensor, (integers, 1), {}).dtype == torch.int64
    torch.set_default_dtype(torch.float64)
    try:
        assert run(aten.mul.Tensor, (integers, 1.0), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert run(aten.mul.Tensor, (X, X[:1]), {}).shape == (3, 4)
    assert run(aten.mul.Tensor, (X[:1], X[:1]), {}).shape == (1, 4)


def test_a_shape_that_depends_on_values_is_an_error_each_time():
    run = KnownShapes()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="meta"):
            run(aten.nonzero.default, (X,), {})
