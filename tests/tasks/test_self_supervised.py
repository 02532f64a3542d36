from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import EpisodeDataset, Labelling, PromptFormat, TaskSet
from meta_peft.tasks.self_supervised import self_supervised
from meta_peft.tasks.sources import opened

ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl"]
PLACES = [f"place{'abcdefghijklmnopqrst'[i]}" for i in range(20)]


def texts(n: int = 240) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"We saw the {rng.choice(ANIMALS)} near the {rng.choice(PLACES)} today." for _ in range(n)]


def made(kind: str, rows: list[dict] | None = None, **options) -> Dataset:
    rows = rows or [{"text": text} for text in texts()]
    return self_supervised(Dataset.from_list(rows), kind, task_column="task", **options)


def test_smlmt_asks_which_word_was_masked():
    """Words of some sentences are classes; those of nearly all or too few are not."""
    rows = list(made("smlmt", least_texts=9, mask="#"))
    of_word = {row["label"]: [r["text"] for r in rows if r["label"] == row["label"]] for row in rows}
    assert of_word
    assert set(of_word) <= set(PLACES)  # an animal is in a sixth of the sentences, "near" in all
    for word, its_texts in of_word.items():
        assert len(its_texts) >= 9
        assert all("#" in text and word not in text for text in its_texts)
        assert {text.replace("#", word) for text in its_texts} <= set(texts())


def test_smlmt_masks_each_occurrence_whatever_its_case():
    rows = made(
        "smlmt", [{"text": "Owl sees owl and the owls do not care."}] * 8 + [{"text": "One two three four five six."}]
    )
    assert "___ sees ___ and the owls do not care." in rows["text"]


def test_smlmt_leaves_no_answer_in_the_text():
    """Neither words within others nor letters that change with their case are taken for what is not masked."""
    lines = [
        "The covid19 wave of {} made us call get_value again.",
        "In {} the covid wave was over, but not İstanbul.",
        "We thought of {} as of a place in istanbul or near.",
    ]
    rows = made("smlmt", [{"text": line.format(PLACES[i])} for line in lines for i in range(8)])
    assert set(rows["label"]) >= {"covid", "i̇stanbul", "istanbul"}
    assert not set(rows["label"]) & {"get", "value"}
    for row in rows:
        assert "___" in row["text"]
        assert not re.search(rf"\b{row['label']}\b", row["text"].lower())


def test_smlmt_episodes_have_classes_and_splits_like_labelled_data():
    tasks = TaskSet(made("smlmt"), "label")
    train, test = tasks.split([0.5, 0.5])
    assert not set(train.names) & set(test.names)

    class Words:
        eos_token_id, bos_token_id = 1, None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

    encoded = train.encoded(PromptFormat(), Words(), 200)
    episodes = EpisodeDataset(encoded, shots=2, query_size=1, length=5, labels=Labelling(3, "letters"))
    for episode in episodes:
        answers = ["".join(map(chr, row["labels"][-3:-1])) for row in episode.support]
        assert sorted(answers) == [" A", " A", " B", " B", " C", " C"]


def test_a_text_without_words_to_choose_from():
    with pytest.raises(MetaPeftError, match=r"Of 3 sentences, 0 words are in 8 to 8 of them.* give more text"):
        made("smlmt", [{"text": text} for text in texts(3)])


def test_spans_are_put_back():
    rows = made("span")
    assert len(rows) == 240
    names = list(rows["task"])
    for row, text in zip(rows, texts(), strict=True):
        assert row["task"].startswith(text[:30])
        assert names.count(row["task"]) == texts().count(text)
        assert row["prompt"].endswith(" ->")
        whole = row["prompt"].removesuffix(" ->").replace("___", row["completion"].strip())
        assert whole == text
        assert 1 <= len(row["completion"].split()) <= 4


def test_continuations_go_on():
    for row, text in zip(made("continuation"), texts(), strict=True):
        assert row["prompt"] + row["completion"] == text
        assert re.match(r" \w", row["completion"])


def test_each_text_is_a_task_which_only_the_same_text_is():
    """In whatever file it stands, and wherever in it."""
    documents = [" ".join(texts()[i : i + 3]) for i in range(0, 9, 3)]
    alike = [f"{documents[0]} {ending}" for ending in "xy"]
    first, second = (made("span", [{"text": text} for text in part]) for part in ([*documents, alike[0]], alike))
    named = list(dict.fromkeys(first["task"]))
    assert len(named) == 4
    assert set(second["task"]) & set(named) == {named[-1]}
    assert [row for row in first if row["task"] == named[-1]] == [row for row in second if row["task"] == named[-1]]
    TaskSet(first).check_disjoint(TaskSet(made("span", [{"text": alike[1]}])))


def test_numbers_are_texts_too():
    """Such as those of a column which only now and then has a word."""
    with pytest.raises(MetaPeftError, match="Of 0 sentences, 0 words are in"):
        made("smlmt", [{"text": 1}, {"text": None}])
    with pytest.raises(MetaPeftError, match=r"None of the 2 texts has a sentence of 6 words.* give more text"):
        made("span", [{"text": 1.5}, {"text": None}])


def test_a_column_of_texts_that_holds_none():
    with pytest.raises(MetaPeftError, match=r"Column 'text' must hold text or numbers; row 1 has \['a'\]"):
        made("continuation", [{"text": ["a"]}])


def test_a_document_is_a_task():
    document = {"text": " ".join(texts(3)), "task": "news"}
    rows = list(made("span", [document, {"text": "Too short.", "task": "news"}, {"text": None, "task": "none"}]))
    assert [row["task"] for row in rows] == ["news"] * 3


def test_the_seed_decides_which_span():
    one, again, other = (list(made("span", seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_of_a_file_it_is_made_once(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("\n".join(texts()), encoding="utf-8")
    first, again = (
        self_supervised(opened(tmp_path / "corpus.txt"), "smlmt", task_column="task").cache_files for _ in range(2)
    )
    assert first == again


def test_without_text():
    with pytest.raises(MetaPeftError, match=r"smlmt makes tasks of a column 'text'; the columns are \['a'\]"):
        made("smlmt", [{"a": "x"}])
