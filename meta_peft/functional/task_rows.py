"""Which rows of a stack belong to which task: kept apart inside the model, or by one forward per task.

A stack is right only if every LoRA layer sees the rows as they went in, ``[T * R, tokens, features]``: row i then meets
the weights of task ``i // R``. An architecture that flattens, gathers or transposes rows in front of a LoRA layer, and a
LoRA layer of an embedding or of the output head, needs one forward per task, where all rows share their weights.

``[tokens, rows, features]`` looks the same where there are as many tokens as rows. With that shape a layer is trusted only
if rows are known to come to it in order: by the type of the model, or since they have in another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from meta_peft.errors import MetaPeftError
from meta_peft.types import Rows


class RowsRearrangedError(MetaPeftError):
    """A LoRA layer does not see the rows of a stack as they went into the model."""


@contextmanager
def rows_in_place(
    layers: Iterable[tuple[str, nn.Module]],
    n_rows: int,
    pooled: frozenset[str] = frozenset(),
    in_order: set[str] | None = None,
) -> Iterator[None]:
    """Forwards inside this context raise `RowsRearrangedError` where a layer gets anything but ``[n_rows, L, H]``.

    Those whose paths are in `pooled` may also get ``[n_rows, H]``, one vector of each row. Those in `in_order` are known to
    get rows in order; what is found out of others is added.
    """
    in_order = set() if in_order is None else in_order

    def check(path: str, x: Tensor) -> None:
        if x.shape[0] != n_rows or not (x.dim() == 3 or (x.dim() == 2 and path in pooled)):
            raise RowsRearrangedError(
                f"{path} gets activations of shape {list(x.shape)} instead of [{n_rows} rows, tokens, features]."
            )
        if x.dim() == 3 and path not in in_order:
            if x.shape[1] == n_rows:
                raise RowsRearrangedError(
                    f"{path} gets activations of shape {list(x.shape)}, which does not show whether rows or tokens"
                    " come first."
                )
            in_order.add(path)

    def hook_of(path: str) -> Any:
        return lambda _, args: check(path, args[0])

    hooks = [layer.register_forward_pre_hook(hook_of(path)) for path, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class TasksApart:
    """The rows of each task of a stack, the same objects at every call, since caches know `Rows` by identity."""

    def __init__(self) -> None:
        self._parts: WeakKeyDictionary[Rows, list[Rows]] = WeakKeyDictionary()

    def of(self, rows: Rows) -> list[Rows]:
        if rows.n_tasks == 1:
            return [rows]
        if rows not in self._parts:
            self._parts[rows] = [rows.tasks(t, t + 1) for t in range(rows.n_tasks)]
        return self._parts[rows]
