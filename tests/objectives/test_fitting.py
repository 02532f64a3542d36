"""Labels that do not fit their rows are refused, whatever kind of model they are for."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, base_of, lora
from heads import model_of, rows_of
from tiny_models import VOCAB, random_rows, tiny
from torch import Tensor

from meta_peft import AdapterLoss, MetaPeftError
from meta_peft.objectives import OBJECTIVES
from meta_peft.types import Rows

ONE_FOR_EACH_TOKEN = ("causal_lm", "masked_lm", "token_classification")
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])


def rows(labels_BL: Tensor, mask_BL: Tensor = MASK) -> Rows:
    return Rows({"input_ids": torch.full_like(mask_BL, 3), "attention_mask": mask_BL}, labels_BL, 2)


def labelled(*places: tuple[int, int], label: int = 5) -> Tensor:
    labels = torch.full_like(MASK, -100)
    labels[:, 1] = 5  # so that every task has a label that fits
    for row, position in places:
        labels[row, position] = label
    return labels


@pytest.mark.parametrize(
    ("objective", "place", "at"), [("causal_lm", 3, 2), ("masked_lm", 2, 2), ("token_classification", 2, 2)]
)
def test_a_label_that_a_masked_position_would_predict(objective: str, place: int, at: int):
    check = OBJECTIVES[objective].check
    message = (
        f"Row 1 of task 1 of a stack of 2 has a label at position {place}, to be predicted at position {at}, where"
    )
    with pytest.raises(MetaPeftError, match=f"{message} attention_mask is 0.*Set labels to -100"):
        check(rows(labelled((3, place))))
    with pytest.raises(MetaPeftError, match=message):
        check(rows(labelled((3, place)), MASK.bool()))
    check(rows(labelled((2, place))))
    check(Rows({"input_ids": MASK}, labelled((3, place)), 2))
    check(Rows({"input_ids": MASK, "attention_mask": MASK[:, None, None]}, labelled((3, place)), 2))


def test_the_first_token_behind_padding_in_front_has_nothing_to_be_predicted_by():
    labels = labelled((3, 2))
    labels[3, 1] = -100
    with pytest.raises(MetaPeftError, match="a label at position 2, to be predicted at position 1"):
        OBJECTIVES["causal_lm"].check(rows(labels, MASK.flip(1)))
    labels[3, 2:] = torch.tensor([-100, 5])
    OBJECTIVES["causal_lm"].check(rows(labels, MASK.flip(1)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_end_that_is_masked_and_predicted_by_a_token_counts(kind: str):
    """Where the padding is the end token, its first one is an answer like any other."""
    model, given = tiny(kind, torch.float32), random_rows()
    length_B = given.inputs["attention_mask"].sum(1)
    labels = given.labels_BL.clone()
    shorter = length_B < labels.shape[1]
    labels[shorter, length_B[shorter]] = given.inputs["input_ids"][shorter, length_B[shorter]]
    given, loss_fn = Rows(given.inputs, labels, 3), AdapterLoss(model)
    assert (given.labels_BL != random_rows().labels_BL).sum() == shorter.sum() > 0
    own = loss_fn.own()
    parts = [given.tasks(t, t + 1) for t in range(3)]
    expected = [model.eval()(**part.inputs, labels=part.labels_BL).loss.item() for part in parts]
    assert loss_fn(own, given).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_labels_that_are_the_inputs_with_their_padding(kind: str):
    """Half of a mean over products that are left out on a CPU was a loss that nobody has."""
    loss_fn = AdapterLoss(lora(base_of(kind), ARCHITECTURES[kind].targets))
    whole = Rows(random_rows().inputs, random_rows().inputs["input_ids"].clone(), 3)
    own = loss_fn.own()
    for use in (loss_fn, loss_fn.scores, loss_fn.log_likelihoods):
        with pytest.raises(MetaPeftError, match="attention_mask is 0"):
            use(own, whole)


@pytest.mark.parametrize("objective", ONE_FOR_EACH_TOKEN)
@pytest.mark.parametrize("length", [3, 5, 1])
def test_labels_of_another_length_than_the_tokens(objective: str, length: int):
    given = Rows({"input_ids": MASK, "attention_mask": MASK}, torch.full((4, length), 5), 2)
    with pytest.raises(MetaPeftError, match=rf"one label for each of input_ids.*\[4, {length}\] for .*\[4, 4\]"):
        OBJECTIVES[objective].check(given)


@pytest.mark.parametrize("length", [3, 5])
def test_labels_of_a_decoder_have_a_length_of_their_own(length: int):
    check, labels = OBJECTIVES["seq2seq_lm"].check, torch.full((4, length), 5)
    check(Rows({"input_ids": MASK, "attention_mask": MASK}, labels, 2))
    check(Rows({"input_ids": MASK, "decoder_input_ids": labels}, labels, 2))
    with pytest.raises(MetaPeftError, match="one label for each of decoder_input_ids"):
        check(Rows({"input_ids": MASK, "decoder_input_ids": MASK}, labels, 2))


@pytest.mark.parametrize("objective", [*ONE_FOR_EACH_TOKEN, "seq2seq_lm"])
@pytest.mark.parametrize(
    ("label", "n_known", "expected"),
    [(-1, 7, "0 to 6"), (-1, None, "0 or more"), (7, 7, "0 to 6"), (-101, 7, "0 to 6")],
)
def test_labels_that_are_no_tokens_or_classes(objective: str, label: int, n_known: int | None, expected: str):
    message = f"Row 0 of task 1 of a stack of 2 has the label {label} at position 2; expected {expected}.*or -100"
    with pytest.raises(MetaPeftError, match=message):
        OBJECTIVES[objective].check(rows(labelled((2, 2), label=label)), n_known)
    OBJECTIVES[objective].check(rows(labelled((2, 2), label=6)), n_known)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_model_knows_its_vocabulary(kind: str):
    loss_fn = AdapterLoss(lora(base_of(kind), ARCHITECTURES[kind].targets))
    with pytest.raises(MetaPeftError, match=f"has the label {VOCAB} at position 1; expected 0 to {VOCAB - 1}, which"):
        loss_fn(loss_fn.own(), rows(labelled((0, 1), label=VOCAB), torch.ones_like(MASK)))


@pytest.mark.parametrize("case", ["bert", "llama", "bert, tokens"])
def test_a_classifier_knows_its_classes(case: str):
    loss_fn, given = AdapterLoss(model_of(case)), rows_of(case)
    given.labels_BL[tuple((given.labels_BL != -100).nonzero()[0])] = 3
    with pytest.raises(MetaPeftError, match=r"has the label 3 at position .*; expected 0 to 2, which this model knows"):
        loss_fn(loss_fn.own(), given)


def test_rows_are_checked_when_they_are_new(monkeypatch: pytest.MonkeyPatch):
    """A device that has them would be waited for in every forward."""
    seen: list[Rows] = []
    loss_fn, given = AdapterLoss(tiny()), random_rows()
    monkeypatch.setattr(type(loss_fn._objective), "check", lambda _, rows, n_known: seen.append(rows))
    for use in (loss_fn, loss_fn.scores, loss_fn, loss_fn.log_likelihoods):
        use(loss_fn.own(), given)
    assert seen == [given]
    loss_fn(loss_fn.own(), random_rows())
    assert len(seen) == 2
