from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from programs import rows_of, wordnet_archive
from text_classification import KINDS, N_TASKS, ROWS_PER_KIND, definitions, tasks_of

REAL = [
    "  29 Princeton University and LICENSEE agrees to preserve same.  ",
    "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04431553 n 0000 | that which is perceived  ",
    "00002724 29 v 01 choke 0 002 @ 00001740 v 0000 + 14081734 n 0101 01 + 02 00 | breathe with great difficulty, as when"
    ' experiencing a strong emotion; "She choked with emotion when she spoke about her deceased husband"  ',
    '07644839 13 n 01 snack 0 001 @ 00001740 n 0000 | food; "a bite"  ',
]


def test_entries_of_wordnet_are_read():
    expected = "breathe with great difficulty, as when experiencing a strong emotion"
    assert list(definitions(REAL)) == [("grooming", expected)]  # 03 is no kind, and "food" is too short


def test_kinds_have_the_numbers_of_lexicographer_files():
    assert (KINDS[4], KINDS[13], KINDS[28], KINDS[29], KINDS[37], KINDS[43]) == (
        "act",
        "food",
        "time",
        "grooming",
        "emotion",
        "weather",
    )
    assert len(set(KINDS.values())) == len(KINDS) == 40


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    glosses = {number: [f"something like number {number} {i}" for i in range(60)] for number in range(4, 44)}
    return wordnet_archive(tmp_path, {**glosses, 5: glosses[5][:20], 3: glosses[4]})


def test_tasks_are_draws_of_five_kinds_that_no_other_split_has(archive: Path):
    splits = tasks_of(archive, 0)
    assert {part: len(tasks) for part, tasks in splits.items()} == N_TASKS | {"validation": 6}  # of six kinds
    kinds = [{row["label"] for rows in tasks.values() for row in rows} for tasks in splits.values()]
    assert [len(found) for found in kinds] == [23, 6, 10]  # one has too few definitions
    assert not kinds[0] & kinds[1] | kinds[0] & kinds[2] | kinds[1] & kinds[2]
    numbers = {kind: str(number) for number, kind in KINDS.items()}
    for rows in (rows for tasks in splits.values() for rows in tasks.values()):
        assert set(Counter(row["label"] for row in rows).values()) == {ROWS_PER_KIND}
        assert len({row["text"] for row in rows}) == 5 * ROWS_PER_KIND
    assert all(row["text"].split()[3] == numbers[row["label"]] for row in rows_of(splits))


def test_letters_mean_something_else_in_each_task(archive: Path):
    splits = tasks_of(archive, 0, letters=True)
    meant: dict[str, set[str]] = {}
    for row in rows_of(splits):
        meant.setdefault(row["label"], set()).add(row["text"].split()[3])
    assert set(meant) == set("ABCDE")
    assert min(map(len, meant.values())) > 20
