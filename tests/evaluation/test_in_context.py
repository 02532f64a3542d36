from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import base_of
from architectures import lora as with_lora
from peft import PeftModel
from surface import SPECIAL, letter_rows, letter_tasks, peft_model, tiny_tokenizer, trained_folder

from meta_peft import EpisodeCollator, EpisodeDataset, MetaPeftError, PromptFormat, TaskSet, load
from meta_peft.evaluation.in_context import behind_examples, ended, in_context_scores
from meta_peft.evaluation.scoring import Matched, scorer_for
from meta_peft.functional.adapter_loss import AdapterLoss


def episodes_of(letters: str, *, shots: int = 2, query_size: int = 3) -> EpisodeDataset:
    encoded = TaskSet.from_mapping(letter_tasks(letters)).encoded(PromptFormat(), tiny_tokenizer(), 64)
    return EpisodeDataset(encoded, shots=shots, query_size=query_size, shuffle=False)


def scores(model: PeftModel, episodes: EpisodeDataset) -> tuple[np.ndarray, np.ndarray, list]:
    """Losses and matches, and the rows that they should be of, written out whole."""
    loss_fn = AdapterLoss(model, second_order=False)
    tokenizer = tiny_tokenizer()
    drawn = [episodes[i] for i in range(len(episodes))]
    collate = EpisodeCollator(tokenizer.pad_token_id)
    loss, match, _ = in_context_scores(Matched(loss_fn), loss_fn.own(), drawn, collate, tokenizer)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return loss, match, [behind_examples(ended(episode, newline)) for episode in drawn]


def test_rows_read_as_examples_and_a_question():
    tokenizer, episodes = tiny_tokenizer(), episodes_of("ab")
    _, _, tasks = scores(peft_model(), episodes)
    assert [len(rows) for rows in tasks] == [3, 3]
    for i, rows in enumerate(tasks):
        support = [tokenizer.decode(row["input_ids"][1:-1]) for row in episodes[i].support]
        assert all(text in {f"{r['input']} -> {r['target']}" for r in letter_rows("ab"[i])} for text in support)
        for row, query in zip(rows, episodes[i].query, strict=True):
            question = tokenizer.decode(query["input_ids"][1:-1])
            expected = f"{SPECIAL['bos_token']}{support[0]}\n{support[1]}\n{question}\n"
            assert tokenizer.decode(row["input_ids"]) == expected
            learned = [token for token in row["labels"] if token != -100]
            assert tokenizer.decode(learned) == f" {2 * 'ab'[i]}\n"
            assert row["labels"] == [-100] * (len(row["labels"]) - len(learned)) + row["input_ids"][-len(learned) :]


def test_losses_are_those_of_an_ordinary_forward():
    model, episodes = load(None, trained_folder()), episodes_of("ab")
    loss, _, tasks = scores(model, episodes)
    assert loss.shape == (2,)
    for i, rows in enumerate(tasks):
        batch = EpisodeCollator(2).rows([rows])
        with torch.no_grad():
            expected = model(**batch.inputs, labels=batch.labels_BL).loss  # all rows have as many labels
        assert loss[i] == pytest.approx(float(expected), abs=1e-5)


def test_a_match_is_what_generation_writes():
    """On a model that has learned some of the rows, and so gets some right and some wrong."""
    model, episodes = peft_model(), episodes_of("abcd")
    learn_to_copy(model, episodes_of("abcd"))
    _, match, tasks = scores(model, episodes)
    generated = [np.mean([writes_its_labels(model, row) for row in rows]) for rows in tasks]
    assert match == pytest.approx(generated)
    assert 0 < match.mean() < 1, "both hits and misses are needed for this test to mean something"


def learn_to_copy(model: PeftModel, episodes: EpisodeDataset) -> None:
    """A few steps of ordinary training on the in-context rows of the first two tasks."""
    _, _, tasks = scores(model, episodes)
    batch = EpisodeCollator(2).rows([tasks[0] + tasks[1][:2]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch.inputs, labels=batch.labels_BL).loss.backward()
        optimizer.step()
    model.eval()


def writes_its_labels(model: PeftModel, row: dict[str, list[int]]) -> bool:
    prompt = torch.tensor([[i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]])
    expected = [label for label in row["labels"] if label != -100]
    written = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(expected), do_sample=False
    )
    return written[0, prompt.shape[1] :].tolist() == expected


def test_answers_are_written_up_to_the_newline():
    """By a model that has learned to end with it."""
    model, episodes, tokenizer = peft_model(), episodes_of("abcd"), tiny_tokenizer()
    learn_to_copy(model, episodes)
    loss_fn = AdapterLoss(model, second_order=False)
    drawn = [episodes[i] for i in range(len(episodes))]
    found = in_context_scores(
        scorer_for("cer", loss_fn, tokenizer), loss_fn.own(), drawn, EpisodeCollator(2), tokenizer
    )
    loss, match, _ = scores(model, episodes)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
    assert ((found.score == 0) == (match == 1)).all()
    assert found.score.min() == 0
    assert found.score.max() < 5, "answers run on behind the newline"


def test_choices_are_ranked_behind_the_examples():
    """Label words, and choices of the rows' own: the same words give the same answer."""
    loss_fn, tokenizer = AdapterLoss(peft_model(), second_order=False), tiny_tokenizer()
    rows = [{"input": word, "target": word[0]} for word in ("ab", "ba", "aa", "bb", "ac", "bc")]
    found = []
    for own in ({}, {"choices": ["a", "b"]}):
        encoded = TaskSet.from_mapping({"t": [{**row, **own} for row in rows]}).encoded(PromptFormat(), tokenizer, 64)
        episode = EpisodeDataset(encoded, shots=3, query_size=3, shuffle=False)[0]
        scorer = scorer_for("ece", loss_fn, tokenizer)
        found.append(in_context_scores(scorer, loss_fn.own(), [episode], EpisodeCollator(2), tokenizer))
    assert len({row["labels"][-2] for row in episode.support}) == 2
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_only_causal_models_take_examples():
    loss_fn = AdapterLoss(with_lora(base_of("t5"), ["q"]), second_order=False)
    with pytest.raises(MetaPeftError, match="need a causal language model; this one is trained as seq2seq_lm"):
        in_context_scores(Matched(loss_fn), {}, [], EpisodeCollator(2), tiny_tokenizer())


def test_a_tokenizer_without_newlines_is_refused():
    class Silent:
        def __call__(self, text: str, **options) -> dict[str, list[int]]:
            return {"input_ids": [] if text == "\n" else [5]}

    loss_fn = AdapterLoss(peft_model(), second_order=False)
    with pytest.raises(MetaPeftError, match="has no newline, which separates in-context examples"):
        in_context_scores(Matched(loss_fn), {}, [], EpisodeCollator(2), Silent())
