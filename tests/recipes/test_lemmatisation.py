from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from lemmatisation import LANGUAGES, ROWS_PER_LANGUAGE, WAYS, entries, languages_of, main, pairs, tasks_of
from package_index import only_from
from programs import front_coded, simplemma_wheel

from meta_peft import MetaPeftError

WORDS = {
    "hauses": "haus",
    "haus": "haus",
    "ging": "gehen",
    "gegangen": "gehen",
    "geht": "gehen",
    "don't": "do",
    "x" * 21: "x",
}
# The beginning of the Arabic dictionary of simplemma 2.0.0, with a count of 2.
REAL = b"SMFC1\x00\x02\x00\tg\xc4\xa7oxor\xd8\xa7\t\x06\xd8\xb9\xd8\xb4\xd8\xb1\t\x02\xd9\x86\xfe"


@pytest.mark.parametrize("backwards", [False, True])
def test_dictionaries_are_read(backwards: bool):
    long = {"a" * 300: "a" * 299 + "b", "b" * 200: "c" * 200}  # lengths of two bytes
    assert dict(entries(front_coded(WORDS | long, backwards=backwards))) == WORDS | long


def test_the_beginning_of_a_real_dictionary():
    assert list(entries(REAL)) == [("għoxor\u0627", "عشر"), ("għoxor\u0627ن", "عشر")]


def test_words_that_are_their_own_lemma_and_what_is_not_of_letters_are_left_out():
    assert [(row["input"], row["target"]) for row in pairs(front_coded(WORDS))] == [
        ("gegangen", "gehen"),
        ("geht", "gehen"),
        ("ging", "gehen"),
        ("hauses", "haus"),
    ]


def test_another_format_is_refused():
    with pytest.raises(MetaPeftError, match="does not begin with b'SMFC1': it is damaged"):
        list(entries(b"\x80\x04}"))


def test_one_task_a_language(tmp_path: Path):
    many = {f"{word}s": word for word in ("a" * n + "b" * m for n in range(1, 10) for m in range(1, 10))}
    wheel = simplemma_wheel(tmp_path, {"de": WORDS, "fr": many})
    splits = tasks_of(wheel, 0, {"train": "fr", "test": "de"})
    assert {part: list(tasks) for part, tasks in splits.items()} == {"train": ["fr"], "test": ["de"]}
    assert len(splits["train"]["fr"]) == 81
    assert tasks_of(wheel, 0, {"train": "fr"}) == {"train": splits["train"]}
    assert tasks_of(wheel, 1, {"train": "fr"}) != {"train": splits["train"]}


def test_with_classes_a_task_is_of_four_languages_of_its_split():
    languages = {"train": "abcdef", "validation": "ghij", "test": "klmno"}
    tasks = {
        p: {n: [{"input": f"{n}{i}", "target": n} for i in range(30)] for n in names} for p, names in languages.items()
    }
    splits = languages_of(tasks, 0)
    assert [len(found) for found in splits.values()] == [15, 1, 5], "as many different draws as there are"
    for part, found in splits.items():
        for name, rows in found.items():
            assert len(set(name.split())) == WAYS
            assert set(name.split()) <= set(languages[part])
            assert Counter(row["label"] for row in rows) == dict.fromkeys(name.split(), ROWS_PER_LANGUAGE)
            assert all(row["text"][0] == row["label"] for row in rows)
            assert len({row["text"] for row in rows}) == len(rows)
    assert languages_of(tasks, 0) == splits != languages_of(tasks, 1)


def test_the_program_with_the_real_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = tmp_path / "index"
    index.mkdir()
    simplemma_wheel(index, {name: WORDS for names in LANGUAGES.values() for name in names.split()})
    only_from(index, monkeypatch)
    assert main([str(tmp_path / "made")]) == 0
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "SOURCE.md",
    }
    assert len((tmp_path / "made" / "test.jsonl").read_text().splitlines()) == 4 * 20


def test_the_program_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    only_from(tmp_path, monkeypatch)
    assert main([str(tmp_path / "made")]) == 2
    assert "The Python package simplemma==2.0.0 could not be had (pip:" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
