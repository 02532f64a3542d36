from __future__ import annotations

import json
from pathlib import Path

import pytest
from reviews import DOMAINS, FEELINGS, LANGUAGES, N_TASKS, ROWS_PER_LABEL, felt, tasks_of


def examples(*pairs: tuple[str, str]) -> str:
    """As a file of the archive has them."""
    scores = [{feeling: int(feeling == right) for feeling in FEELINGS} for _, right in pairs]
    return json.dumps(
        {"examples": [{"input": text, "target_scores": s} for (text, _), s in zip(pairs, scores, strict=True)]}
    )


def test_sentences_by_feeling(tmp_path: Path):
    file = tmp_path / "task.json"
    file.write_text(
        examples(
            ("The breakfast  was\nwonderful.", "positive"),
            ("The breakfast was wonderful.", "positive"),
            ("We came late at night.", "neutral"),
            ("It is what it is, after all.", "negative"),
            ("It is what it is, after all.", "ambivalent"),
            ("It is what it is, after all.", "negative"),
            ("Too short", "negative"),
            (101 * "x", "negative"),
        )
    )
    nothing: list[str] = []
    expected = {"positive": ["The breakfast was wonderful."], "negative": nothing, "ambivalent": nothing}
    assert felt(file) == expected | {"neutral": ["We came late at night."]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Room for three tasks each, of which the rarest feeling decides."""
    folder = tmp_path_factory.mktemp("multiemo")
    for domain in ("hotels", "medicine", "reviews", "products"):
        for language in LANGUAGES:
            name = folder / f"{domain}_sentence_{language}"
            name.mkdir()
            n = {"positive": 3 * ROWS_PER_LABEL, "negative": 200, "ambivalent": 150, "neutral": 90}
            pairs = [(f"{domain} {language} {feeling} {i}", feeling) for feeling in FEELINGS for i in range(n[feeling])]
            (name / "task.json").write_text(examples(*pairs))
    return folder


def test_a_task_is_of_a_domain_and_a_language_and_has_sentences_of_its_own(folder: Path):
    splits = tasks_of(folder, 0)
    for part, tasks in splits.items():
        n = min(3, N_TASKS[part])
        names = [f"{d} {language} {i + 1}" for d in DOMAINS[part] for language in LANGUAGES for i in range(n)]
        assert list(tasks) == names
        texts = [row["text"] for rows in tasks.values() for row in rows]
        assert len(set(texts)) == len(texts) == len(names) * len(FEELINGS) * ROWS_PER_LABEL
        for name, rows in tasks.items():
            assert {row["text"].rsplit(" ", 2)[0] for row in rows} == {name.rsplit(" ", 1)[0]}
            assert all(row["text"].split()[2] == row["label"] for row in rows)


def test_no_domain_is_in_two_splits():
    domains = [domain for found in DOMAINS.values() for domain in found]
    assert len(set(domains)) == len(domains) == 4


def test_the_seed_decides_which_sentences(folder: Path):
    assert tasks_of(folder, 0) == tasks_of(folder, 0) != tasks_of(folder, 1)
