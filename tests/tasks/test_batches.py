"""Episodes made of tensors: the same as what the collator makes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from architectures import base_of, lora
from tiny_models import VOCAB, tiny

from meta_peft import AdapterLoss, MetaPeftError, episode_batch


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


def inputs(rows: int, length: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, rows * length + 1).view(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}


def sound(rows: int, frames: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.ones(rows, 3, frames), "labels": torch.ones(rows, 2).long()}


IDS = torch.tensor([[1, 2], [3, 4]])


def test_rows_are_stacked_task_by_task_and_padded():
    batch = episode_batch([inputs(2, 3), inputs(2, 4)], [inputs(1, 2), inputs(1, 2)], ["a", "b"])
    assert (batch.n_tasks, batch.tasks) == (2, ["a", "b"])
    assert batch.support.inputs["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.support.inputs["attention_mask"][:2].tolist() == [[1, 1, 1, 0]] * 2
    assert batch.support.labels_BL[0].tolist() == [1, 2, 3, -100]
    assert batch.query.labels_BL.tolist() == [[1, 2], [1, 2]]
    assert "labels" not in batch.support.inputs


def test_what_is_padded_gets_a_mask():
    def without(rows: int, length: int) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in inputs(rows, length).items() if name != "attention_mask"}

    batch = episode_batch([without(1, 3), without(1, 4)], [without(1, 2)] * 2)
    assert batch.support.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert list(batch.query.inputs) == ["input_ids"]


def test_the_loss_of_a_task_depends_on_no_longer_neighbour():
    """An encoder reads what is padded, unless a mask says that it is."""
    model = lora(base_of("bert"), ("query", "value"))
    tasks = [{"input_ids": t, "labels": t} for t in (random_ids(2, 4), random_ids(2, 9))]
    loss_fn = AdapterLoss(model)
    together = loss_fn(loss_fn.own(), episode_batch(tasks, tasks).query)
    alone = [loss_fn(loss_fn.own(), episode_batch([task], [task]).query).item() for task in tasks]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


def test_labels_of_rows_may_be_one_number_each():
    given = {**inputs(2, 3), "labels": torch.tensor([2, 0])}
    assert episode_batch([given], [given]).support.labels_BL.tolist() == [[2], [0]]


def test_sound_is_stacked_as_it_is():
    batch = episode_batch([sound(2, 4)] * 3, [sound(1, 4)] * 3)
    assert batch.support.inputs["input_features"].shape == (6, 3, 4)
    assert "attention_mask" not in batch.support.inputs


def test_padding_hides_no_labels_that_do_not_fit():
    """The longer task has three labels for five tokens, and stacked with the other one there would be six and six."""
    short = {**inputs(2, 5), "labels": inputs(2, 3)["labels"]}
    batch = episode_batch([inputs(2, 6), short], [inputs(1, 2)] * 2)
    loss_fn = AdapterLoss(tiny())
    with pytest.raises(MetaPeftError, match="one label for each of input_ids"):
        loss_fn(loss_fn.own(), batch.support)
    decoder = {"decoder_input_ids": short["labels"]}
    longer = {**inputs(2, 6), "decoder_input_ids": inputs(2, 6)["labels"]}
    batch = episode_batch([longer, short | decoder], [inputs(1, 2)] * 2)
    assert batch.support.labels_BL.shape == batch.support.inputs["decoder_input_ids"].shape


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        ([], [], "one at least; got 0 and 0"),
        ([inputs(1, 2)], [], "got 1 and 0 tasks"),
        ([inputs(1, 2), inputs(2, 2)], [inputs(1, 2)] * 2, "equally many support rows"),
        ([inputs(1, 2)], [{"input_ids": torch.ones(1, 2)}], r"query rows have \['input_ids'\], and no labels"),
        ([inputs(1, 2), inputs(1, 2, more=torch.ones(1, 2))], [inputs(1, 2)] * 2, "the same inputs"),
        ([inputs(1, 2, more=torch.ones(2))], [inputs(1, 2)], r"rows of tokens, \[R, L\]"),
        (inputs(1, 2), [inputs(1, 2)] * 3, "its support rows are a dict of tensors; got str"),
        ([{"input_ids": [[1, 2]], "labels": [[1, 2]]}], [inputs(1, 2)], 'return_tensors="pt"; got .*list'),
        ([inputs(3, 2, labels=IDS)], [inputs(1, 2)], r"equally many .* got .*\[3, 2\].*\[2, 2\]"),
        ([inputs(2, 3, attention_mask=IDS)], [inputs(1, 2)], "tokens and mask equally long"),
        ([inputs(2, 3, decoder_input_ids=IDS)], [inputs(1, 2)], "as long as labels"),
        ([inputs(2, 2, labels=IDS[None])], [inputs(1, 2)], r"with labels \[R, L\] or \[R\]"),
        ([inputs(2, 2, labels=IDS.float())], [inputs(1, 2)], "labels of type torch.float32; expected whole numbers"),
        ([inputs(2, 2)], [inputs(2, 2, labels=-IDS)], "Task '0': its query rows have the label -1; expected 0 or more"),
        ([sound(2, 4), sound(2, 5)], [sound(2, 4)] * 2, r"input_features have .*\[2, 3, 5\].*the same size"),
    ],
)
def test_what_is_no_batch(support: list, query: list, message: str):
    with pytest.raises(MetaPeftError, match=message):
        episode_batch(support, query)


def test_names_are_of_the_tasks():
    with pytest.raises(MetaPeftError, match="1 tasks and 2 names"):
        episode_batch([inputs(1, 2)], [inputs(1, 2)], ["a", "b"])
