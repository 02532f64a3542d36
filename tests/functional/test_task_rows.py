from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import random_rows
from torch import nn

from meta_peft.functional.task_rows import RowsRearrangedError, TasksApart, rows_in_place


@pytest.mark.parametrize("shape", [(24, 2), (4, 6, 2), (6, 4, 1, 2), (6, 4)])
def test_rows_that_do_not_arrive_as_they_went_in(shape: tuple[int, ...]):
    """Six rows of four tokens: flattened, transposed, split, or not embedded yet."""
    layer = nn.Identity()
    shown = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    with (
        rows_in_place([("a.layer", layer)], 6),
        pytest.raises(RowsRearrangedError, match=rf"a\.layer gets activations of shape {shown} instead of \[6 rows"),
    ):
        layer(torch.zeros(shape))
    assert not layer._forward_pre_hooks


def test_rows_that_do():
    layers = [("a", nn.Identity()), ("b", nn.Identity())]
    with rows_in_place(layers, 6):
        for _, layer in layers:
            for tokens in (1, 4):
                layer(torch.zeros(6, tokens, 2))
    assert not any(layer._forward_pre_hooks for _, layer in layers)


def test_the_rows_of_each_task_are_the_same_objects_at_every_call():
    apart, rows = TasksApart(), random_rows(n_tasks=3)
    parts = apart.of(rows)
    assert [part.n_tasks for part in parts] == [1, 1, 1]
    for t, part in enumerate(parts):
        assert torch.equal(part.labels_BL, rows.tasks(t, t + 1).labels_BL)
    assert all(one is again for one, again in zip(parts, apart.of(rows), strict=True))
    assert apart.of(random_rows(n_tasks=3))[0] is not parts[0]


def test_one_task_is_itself():
    rows = random_rows(n_tasks=1)
    assert TasksApart().of(rows) == [rows]


def test_parts_go_with_their_rows():
    apart, rows = TasksApart(), random_rows()
    apart.of(rows)
    assert len(apart._parts) == 1
    del rows
    gc.collect()
    assert len(apart._parts) == 0
