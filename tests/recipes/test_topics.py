from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import topics
from programs import tar
from topics import N_TASKS, ROWS_PER_TOPIC, WAYS, tasks_of

N, WORDS = 60, 40
LEXICON = "\n".join(
    "\t".join([f"topic_{t}", *(f"word_{t}_{w}" for w in range(WORDS)), *(f"word_{(t + 1) % N}_{w}" for w in range(4))])
    for t in range(N)
)


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[str, list[dict[str, str]]]]:
    return tasks_of(LEXICON, 0)


def test_a_task_is_of_four_topics_and_words_of_one_of_them_alone(splits):
    assert {part: len(tasks) for part, tasks in splits.items()} == N_TASKS
    shared = {f"word {(t + 1) % N} {w}": {f"topic_{t}", f"topic_{(t + 1) % N}"} for t in range(N) for w in range(4)}
    for tasks in splits.values():
        for name, rows in tasks.items():
            drawn = set(name.split())
            assert len(drawn) == WAYS
            assert Counter(row["label"] for row in rows) == dict.fromkeys(drawn, ROWS_PER_TOPIC)
            assert len({row["text"] for row in rows}) == len(rows)
            for row in rows:
                assert row["text"].split()[0] == "word"
                assert row["text"] not in shared or not shared[row["text"]] <= drawn


def test_no_topic_and_no_word_is_in_two_splits(splits):
    for what in ("label", "text"):
        found = [{row[what] for rows in tasks.values() for row in rows} for tasks in splits.values()]
        assert len(set.union(*found)) == sum(map(len, found))


def test_the_seed_says_which_topics_are_in_which_split(splits):
    assert tasks_of(LEXICON, 0) == splits
    assert set(tasks_of(LEXICON, 1)["test"]) != set(splits["test"])


def test_too_few_topics_are_no_tasks():
    few = "\n".join(LEXICON.splitlines()[:6])
    assert [len(tasks) for tasks in tasks_of(few, 0).values()] == [1, 0, 0]  # four topics, one, one


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    archive = tmp_path / "empath-0.89.tar.gz"
    archive.write_bytes(tar({"empath-0.89/empath/data/categories.tsv": LEXICON.encode()}))
    monkeypatch.setattr(topics, "pip_download", lambda *_, **__: archive)  # pip would build it first, from the network
    assert topics.main([str(tmp_path / "data")]) == 0
    assert "train: 120 tasks, 11520 rows" in capsys.readouterr().out
    assert "empath==0.89" in (tmp_path / "data/SOURCE.md").read_text()
