from __future__ import annotations

from pathlib import Path

import pytest
from programs import rows_of, vader_archive
from sentiment import ROWS_PER_LABEL, WORDS, rated, tasks_of

REAL = """1\t2.726315789\tSomehow I was blessed with some really amazing friends in my life who love me.
2_1\t-2.85\twhat a disappointment &amp; waste of \t money!
3\t0.9\tset up was easy, they say, and I believe it
4\t1.5\tToo short
5\t-3\t""" + (140 * "bad ")


def test_clear_short_texts_are_taken():
    assert rated(REAL) == {
        True: ["Somehow I was blessed with some really amazing friends in my life who love me."],
        False: ["what a disappointment & waste of money!"],
    }


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    names = ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
    lines = {name: [f"{i}\t{(-1) ** i * 2.5}\t{name} number {i} is so" for i in range(80)] for name in names}
    return vader_archive(tmp_path, {name: "\n".join(found) + "\n" for name, found in lines.items()})


def test_a_task_is_a_domain_and_a_pair_of_words(archive: Path):
    splits = tasks_of(archive, 0)
    pairs = {part: words.split() for part, words in WORDS.items()}
    assert list(splits["train"]) == [f"{domain} {words}" for domain in ("tweets", "films") for words in pairs["train"]]
    assert list(splits["validation"]) == [f"editorials {words}" for words in pairs["validation"]]
    assert list(splits["test"]) == [f"products {words}" for words in pairs["test"]]
    for tasks in splits.values():
        for name, rows in tasks.items():
            positive, negative = name.split(" ")[1].split("/")
            assert len({row["text"] for row in rows}) == 2 * ROWS_PER_LABEL
            for row in rows:
                assert row["label"] == (positive if int(row["text"].split()[2]) % 2 == 0 else negative)


def test_domains_and_arbitrary_words_are_in_one_split_alone(archive: Path):
    domains = [
        {row["text"].split()[0] for row in rows_of({part: tasks})} for part, tasks in tasks_of(archive, 0).items()
    ]
    assert [len(found) for found in domains] == [2, 1, 1]
    arbitrary = [set(words.split()) - {"positive/negative"} for words in WORDS.values()]
    assert len(set.union(*arbitrary)) == sum(map(len, arbitrary))


def test_with_classes_every_task_has_texts_of_its_own(archive: Path):
    splits = tasks_of(archive, 0, classes=True)
    assert {part: list(tasks) for part, tasks in splits.items()} == {
        "train": ["tweets 1", "films 1"],
        "validation": ["editorials 1"],
        "test": ["products 1"],
    }
    for tasks in splits.values():
        for rows in tasks.values():
            assert len({row["text"] for row in rows}) == 2 * ROWS_PER_LABEL
            right = ["positive" if int(row["text"].split()[2]) % 2 == 0 else "negative" for row in rows]
            assert [row["label"] for row in rows] == right


def test_with_classes_no_text_is_in_two_tasks(tmp_path: Path):
    names = ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
    lines = {name: [f"{i}\t{(-1) ** i * 2.5}\t{name} number {i} is so" for i in range(200)] for name in names}
    for tasks in tasks_of(
        vader_archive(tmp_path, {n: "\n".join(found) for n, found in lines.items()}), 0, True
    ).values():
        texts = [row["text"] for rows in tasks.values() for row in rows]
        assert len(texts) == len(set(texts)) == len(tasks) * 2 * ROWS_PER_LABEL
        assert len(tasks) % 4 == 0
