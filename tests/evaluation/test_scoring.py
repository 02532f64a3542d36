from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import base_of, rows_for
from architectures import lora as with_lora
from surface import letter_tasks, tiny_tokenizer, trained_folder

from meta_peft import EpisodeCollator, MetaPeftError, PromptFormat, TaskSet, load
from meta_peft.adapters.hub import meta_learned
from meta_peft.evaluation.evaluate import Start, curve
from meta_peft.evaluation.metrics import METRICS
from meta_peft.evaluation.predictions import choice_scores, references, with_choices, written
from meta_peft.evaluation.scoring import Chosen, Matched, Predicted, Scorer, Written, scorer_for
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.params import expand
from meta_peft.tasks.held_out import held_out
from meta_peft.types import EpisodeBatch, Params

WORDS = {"vowels": ("yes", "no"), "reversed": ("no", "yes")}


def yes_or_no() -> dict[str, list[dict[str, str]]]:
    """Two tasks that contradict each other: whether there is an a in the input, and whether there is none."""
    inputs = ["abc", "bcd", "cda", "efg", "hai", "klm", "nop", "apo"]
    return {
        name: [{"input": text, "target": words["a" not in text]} for text in inputs] for name, words in WORDS.items()
    }


@pytest.fixture(scope="module")
def loss_fn() -> AdapterLoss:
    return AdapterLoss(load(None, trained_folder()), second_order=False)


def batch_of(tasks: dict, **options) -> EpisodeBatch:
    tokenizer = tiny_tokenizer()
    encoded = TaskSet.from_mapping(tasks).encoded(PromptFormat(), tokenizer, 32)
    episodes = held_out(encoded, shots=3, **options)
    return EpisodeCollator(tokenizer.pad_token_id)([episodes[i] for i in range(len(episodes))])


def adapted(loss_fn: AdapterLoss, batch: EpisodeBatch, steps: int = 3) -> Params:
    sidecar = meta_learned(loss_fn.model).sidecar
    own = dict(loss_fn.weights.parameters())
    return adapt(loss_fn, own, {RATES: sidecar.log_rates}, batch.support, sidecar.inner, steps=steps)


def test_which_scorer_a_metric_gets(loss_fn: AdapterLoss):
    kinds = {name: type(scorer_for(name, loss_fn, tiny_tokenizer())) for name in METRICS}
    chosen = dict.fromkeys(("accuracy", "macro_f1", "ece"), Chosen)
    assert kinds == {**dict.fromkeys(METRICS, Written), "exact_match": Matched, **chosen}
    assert scorer_for(None, loss_fn, tiny_tokenizer()).metric.name == "exact_match"
    assert scorer_for("accuracy", loss_fn, tiny_tokenizer(), choice_score="mean").mean
    masked = SimpleNamespace(objective="masked_lm")
    assert [type(scorer_for(name, masked, None)) for name in ("accuracy", "cer", None)] == [Chosen, Predicted, Matched]
    for head in ("sequence_classification", "token_classification"):
        scorer = scorer_for(None, SimpleNamespace(objective=head), None)
        assert (type(scorer), scorer.metric.name) == (Predicted, "accuracy")
        with pytest.raises(MetaPeftError, match=f"chrf compares texts, but {head} predicts classes: take accuracy"):
            scorer_for("chrf", SimpleNamespace(objective=head), None)


def test_written_answers_are_judged_as_text(loss_fn: AdapterLoss):
    tokenizer, batch = tiny_tokenizer(), batch_of(letter_tasks("mnop"))
    fast = adapted(loss_fn, batch)
    scorer = scorer_for("cer", loss_fn, tokenizer, max_new_tokens=4)
    scores = scorer(batch)(fast)
    found = [
        tokenizer.decode(a, skip_special_tokens=True).strip()
        for a in written(loss_fn, fast, batch.query, stop=[1], max_new_tokens=4)
    ]
    right = [letter * 2 for letter in "mnop" for _ in range(5)]
    assert [tokenizer.decode(a, skip_special_tokens=True).strip() for a in references(batch.query)] == right
    expected = [METRICS["cer"](found[i : i + 5], right[i : i + 5]) for i in range(0, 20, 5)]
    np.testing.assert_allclose(scores.score, expected)
    np.testing.assert_allclose(scores.loss, loss_fn.scores(fast, batch.query).loss_T, rtol=1e-6)
    assert len(set(found)) > 1


def test_what_ends_an_answer(loss_fn: AdapterLoss):
    config = loss_fn.model.get_base_model().generation_config
    own = config.eos_token_id
    try:
        config.eos_token_id = [7, tiny_tokenizer().eos_token_id]
        scorer = scorer_for("chrf", loss_fn, tiny_tokenizer())
    finally:
        config.eos_token_id = own
    assert scorer.stop == (tiny_tokenizer().eos_token_id, 7)


@pytest.mark.parametrize("mean", [False, True])
def test_label_words_are_chosen_by_likelihood(loss_fn: AdapterLoss, mean: bool):
    tokenizer, batch = tiny_tokenizer(), batch_of(yes_or_no())
    fast = adapted(loss_fn, batch, steps=8)
    yes, no = ([*tokenizer(f" {word}", add_special_tokens=False)["input_ids"], 1] for word in ("yes", "no"))
    each = with_choices(batch.query, [[yes, no]] * 10, causal=True)
    scores_BC = choice_scores(loss_fn, fast, each, mean=mean)
    right = np.array([0 if answer == yes else 1 for answer in references(batch.query)])
    hits = (scores_BC.argmax(1).numpy() == right).reshape(2, 5)
    assert 0 < hits.mean() < 1, "both right and wrong answers are needed"

    def scored(name: str) -> np.ndarray:
        return Chosen(loss_fn, METRICS[name], mean)(batch)(fast).score

    np.testing.assert_allclose(scored("accuracy"), hits.mean(1))
    confidence = scores_BC.double().softmax(1).amax(1).numpy().reshape(2, 5)
    expected = [METRICS["ece"](c.tolist(), h.tolist()) for c, h in zip(confidence, hits, strict=True)]
    np.testing.assert_allclose(scored("ece"), expected, atol=1e-6)


def test_rows_may_have_choices_of_their_own(loss_fn: AdapterLoss):
    """The same rows with choices that hold a much likelier one: it is chosen."""
    tasks = yes_or_no()
    scorer: Scorer = Chosen(loss_fn, METRICS["accuracy"])
    plain = batch_of(tasks)
    fast = adapted(loss_fn, plain, steps=8)
    with_own = {name: [{**row, "choices": ["yes", "no"]} for row in rows] for name, rows in tasks.items()}
    batch = batch_of(with_own)
    assert torch.equal(batch.query.labels_BL, plain.query.labels_BL)
    assert batch.query.choices_BCL.shape == (10, 2, 5)
    np.testing.assert_array_equal(scorer(batch)(fast).score, scorer(plain)(fast).score)
    likelier = {name: [{**row, "choices": ["yes", "no", "a"]} for row in rows] for name, rows in tasks.items()}
    choices = references(batch_of(likelier).query)
    assert choices == references(plain.query)  # what is learned is the right answer alone
    assert (scorer(batch_of(likelier))(fast).score <= scorer(plain)(fast).score).all()
    uneven = {
        name: [{**row, "choices": ["yes", "no", "ja"][: 2 + i % 2]} for i, row in enumerate(rows)]
        for name, rows in tasks.items()
    }
    assert batch_of(uneven).query.choices_BCL.shape == (10, 3, 5)
    assert (scorer(batch_of(uneven))(fast).score <= scorer(plain)(fast).score).all()


def test_a_task_with_one_answer_is_named(loss_fn: AdapterLoss, caplog: pytest.LogCaptureFixture):
    batch = batch_of({"mixed": yes_or_no()["vowels"], **letter_tasks("m")})
    with caplog.at_level(logging.WARNING, "meta_peft"):
        score = Chosen(loss_fn, METRICS["accuracy"])(batch)
    assert [r.getMessage() for r in caplog.records] == [
        "The rows of task 'say m' all have the same answer, so there is nothing to choose from."
    ]
    assert score(dict(loss_fn.weights.parameters())).score[1] == 1


def test_classes_and_texts_at_labelled_positions():
    """A masked language model's, which are predicted as a head's classes are."""
    model_loss = AdapterLoss(with_lora(base_of("bert"), ["query", "value"]), second_order=False)
    rows = rows_for(model_loss.model.get_base_model(), n_tasks=2, per_task=3)
    own = dict(model_loss.weights.parameters())
    predicted = model_loss.scores(own, rows).predicted_BL
    places = (rows.labels_BL != -100).nonzero()
    for row, position in places[::2].tolist():  # every other label is what the model predicts anyhow
        rows.labels_BL[row, position] = predicted[row, position]
    hits = [(t, bool(predicted[r, p] == rows.labels_BL[r, p])) for r, p in places.tolist() for t in [r // 3]]
    expected = [np.mean([hit for task, hit in hits if task == t]) for t in range(2)]
    batch = EpisodeBatch(rows, rows, ["a", "b"])
    fast = expand(own, 2)
    accuracy = Predicted(model_loss, METRICS["accuracy"])(batch)(fast)
    np.testing.assert_allclose(accuracy.score, expected)
    assert 0 < min(expected) < 1
    error = Predicted(model_loss, METRICS["ece"])(batch)(fast).score
    confidence = model_loss.scores(own, rows).confidence_BL
    of_task = [[float(confidence[r, p]) for r, p in places.tolist() if r // 3 == t] for t in range(2)]
    by_hand = [METRICS["ece"](of_task[t], [hit for task, hit in hits if task == t]) for t in range(2)]
    np.testing.assert_allclose(error, by_hand, atol=1e-6)

    tokenizer = tiny_tokenizer()
    texts = Predicted(model_loss, METRICS["exact_match"], tokenizer)(batch)(fast)
    np.testing.assert_allclose(texts.score, model_loss.scores(fast, rows).exact_match_T)


def test_a_curve_carries_the_metrics_name_and_its_scores(loss_fn: AdapterLoss):
    sidecar, batch = meta_learned(loss_fn.model).sidecar, batch_of(letter_tasks("mn"))
    own = {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
    start = Start("mine", own, {RATES: sidecar.log_rates}, sidecar.inner)
    scorer = scorer_for("token_f1", loss_fn, tiny_tokenizer())
    found = curve(loss_fn, start, [batch], [0, 3], scorer=scorer)
    assert found.metric == "token_f1"
    for i, steps in enumerate((0, 3)):
        np.testing.assert_allclose(found.score[:, i], scorer(batch)(adapted(loss_fn, batch, steps)).score)
