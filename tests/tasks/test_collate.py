from __future__ import annotations

import numpy as np
import pytest
import torch

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.collate import EpisodeCollator
from meta_peft.types import Episode


def row(*ids: int, prompt: int = 1) -> dict:
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:]), "task": "ignored"}


EPISODES = [
    Episode("first", [row(10, 11), row(12, 13, 14)], [row(15, 16)]),
    Episode("second", [row(20, 21, 22, 23, prompt=3), row(24, 25)], [row(26, 27, 28)]),
]


def test_rows_are_task_major_and_padded_on_the_right():
    batch = EpisodeCollator(pad_token_id=0)(EPISODES)
    assert batch.tasks == ["first", "second"]
    assert batch.n_tasks == batch.support.n_tasks == batch.query.n_tasks == 2
    assert batch.support.inputs["input_ids"].tolist() == [
        [10, 11, 0, 0], [12, 13, 14, 0], [20, 21, 22, 23], [24, 25, 0, 0]]  # fmt: skip
    assert batch.support.inputs["attention_mask"].tolist() == [
        [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]  # fmt: skip
    assert batch.support.labels_BL.tolist() == [
        [-100, 11, -100, -100], [-100, 13, 14, -100], [-100, -100, -100, 23], [-100, 25, -100, -100]]  # fmt: skip
    # support and query are padded apart
    assert batch.query.inputs["input_ids"].tolist() == [[15, 16, 0], [26, 27, 28]]


def test_a_token_that_is_also_the_padding_token_is_kept():
    """Many tokenizers pad with the end-of-sequence token: the mask and the labels say which is which."""
    rows = EpisodeCollator(pad_token_id=9).rows([[row(1, 9), row(1, 2, 9)]])
    assert rows.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert rows.labels_BL.tolist() == [[-100, 9, -100], [-100, 2, 9]]


def test_parts_of_a_batch_are_its_tasks():
    batch = EpisodeCollator(pad_token_id=0)([*EPISODES, EPISODES[0]])
    assert batch.part(0, 3) is batch
    chunks = [batch.part(0, 2), batch.part(2, 3)]
    assert [c.tasks for c in chunks] == [["first", "second"], ["first"]]
    assert [c.n_tasks for c in chunks] == [2, 1]
    assert chunks[1].support.inputs["input_ids"].tolist() == [[10, 11, 0, 0], [12, 13, 14, 0]]
    assert chunks[1].query.labels_BL.tolist() == [[-100, 16, -100]]
    copy = chunks[0].to("cpu")
    assert copy.tasks == chunks[0].tasks
    assert copy.support.labels_BL.equal(chunks[0].support.labels_BL)


def test_stacks_keep_the_order():
    stacks = EpisodeCollator(pad_token_id=0).stacks([*EPISODES, EPISODES[0]], 2)
    assert [batch.tasks for batch in stacks] == [["first", "second"], ["first"]]
    assert stacks[1].support.inputs["input_ids"].tolist() == [[10, 11, 0], [12, 13, 14]]


def test_a_row_without_a_label_is_refused():
    with pytest.raises(MetaPeftError, match="no labelled token"):
        EpisodeCollator(0).rows([[{"input_ids": [1, 2], "labels": [-100, -100]}]])


def test_a_batch_in_the_order_of_its_lengths():
    batch = EpisodeCollator(pad_token_id=0)([EPISODES[1], EPISODES[0], EPISODES[1]])
    ordered, order = batch.by_length()
    assert sorted(order.tolist()) == [0, 1, 2]
    assert ordered.tasks == [batch.tasks[t] for t in order]
    ends = [max(row.nonzero().max().item() for row in ordered.part(t, t + 1).support.labels_BL + 100) for t in range(3)]
    assert ends == sorted(ends)
    for place, task in enumerate(order.tolist()):
        for name in ("support", "query"):
            mine, own = getattr(ordered.part(place, place + 1), name), getattr(batch.part(task, task + 1), name)
            assert mine.labels_BL.equal(own.labels_BL)
            assert mine.inputs["input_ids"].equal(own.inputs["input_ids"])


def test_each_feature_has_a_length_of_its_own():
    """An encoder's tokens, a decoder's, and the labels; what is no feature is left out."""
    short = {"input_ids": [5], "decoder_input_ids": [2, 6], "labels": [6, 1], "task": "x", "other": [1]}
    long = {"input_ids": [5, 6, 7], "decoder_input_ids": [2, 6, 7], "labels": [6, 7, 1], "task": "x", "other": [1]}
    rows = EpisodeCollator(0).rows([[short], [long]])
    assert list(rows.inputs) == ["input_ids", "decoder_input_ids", "attention_mask"]
    assert rows.inputs["input_ids"].tolist() == [[5, 0, 0], [5, 6, 7]]
    assert rows.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert rows.inputs["decoder_input_ids"].tolist() == [[2, 6, 0], [2, 6, 7]]
    assert rows.labels_BL.tolist() == [[6, 1, -100], [6, 7, 1]]
    assert rows.positions_per_task == 3


def test_sound_and_classes():
    sounds = [np.full((2, 4), i, dtype=np.float32) for i in range(2)]
    rows = EpisodeCollator(0).rows([[{"input_features": s, "labels": [3], "decoder_input_ids": [1]} for s in sounds]])
    assert rows.inputs["input_features"].shape == (2, 2, 4)
    assert rows.inputs["input_features"].dtype == torch.float32
    assert rows.positions_per_task == 8
    classes = EpisodeCollator(0).rows([[{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [1], "labels": [0]}]])
    assert classes.labels_BL.tolist() == [[1], [0]]
