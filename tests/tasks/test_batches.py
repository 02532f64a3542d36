"""Episodes made of tensors: the same as what the collator makes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from meta_peft import MetaPeftError, episode_batch


def inputs(rows: int, length: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, rows * length + 1).view(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}


def test_rows_are_stacked_task_by_task_and_padded():
    batch = episode_batch([inputs(2, 3), inputs(2, 4)], [inputs(1, 2), inputs(1, 2)], ["a", "b"])
    assert (batch.n_tasks, batch.tasks) == (2, ["a", "b"])
    assert batch.support.inputs["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.support.inputs["attention_mask"][:2].tolist() == [[1, 1, 1, 0]] * 2
    assert batch.support.labels_BL[0].tolist() == [1, 2, 3, -100]
    assert batch.query.labels_BL.tolist() == [[1, 2], [1, 2]]
    assert "labels" not in batch.support.inputs


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        ([], [], "one at least; got 0 and 0"),
        ([inputs(1, 2)], [], "got 1 and 0 tasks"),
        ([inputs(1, 2), inputs(2, 2)], [inputs(1, 2)] * 2, "equally many support rows"),
        ([inputs(1, 2)], [{"input_ids": torch.ones(1, 2)}], r"query rows have \['input_ids'\], and no labels"),
        ([inputs(1, 2), inputs(1, 2, more=torch.ones(1, 2))], [inputs(1, 2)] * 2, "the same inputs"),
        ([inputs(1, 2, more=torch.ones(2))], [inputs(1, 2)], r"rows of tokens, \[R, L\]"),
    ],
)
def test_what_is_no_batch(support: list, query: list, message: str):
    with pytest.raises(MetaPeftError, match=message):
        episode_batch(support, query)


def test_names_are_of_the_tasks():
    with pytest.raises(MetaPeftError, match="1 tasks and 2 names"):
        episode_batch([inputs(1, 2)], [inputs(1, 2)], ["a", "b"])
