from __future__ import annotations

from collections import Counter
from pathlib import Path

import bigbench
import data_wrangling
import question_answering
from programs import bigbench_archive

DATES = [("'290386'", "'29-03-86'"), ("'25 03 74'", "'25-03-74'")] + [(f"'{i}'", f"'{i}-'") for i in range(30)]


def test_only_the_tasks_of_the_families_are_unpacked(tmp_path: Path):
    tasks = {"qa_wikidata": [("a", "b")], "mult_data_wrangling/f_1_dates_1": DATES, "other": [], "qa_wikidata_2": []}
    archive = bigbench_archive(tmp_path, tasks)
    bigbench.unpack(archive, tmp_path / "kept")
    files = {path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.json")}
    assert files == {"qa_wikidata/task.json", "mult_data_wrangling/f_1_dates_1/task.json"}


def test_examples_with_several_answers_are_left_out(tmp_path: Path):
    bigbench.unpack(bigbench_archive(tmp_path, {"qa_wikidata": [(" a ", "b"), ("c", ["d", "e"])]}), tmp_path)
    assert list(bigbench.examples(tmp_path / "qa_wikidata" / "task.json")) == [("a", "b")]


def test_what_is_unpacked_is_not_downloaded_again(tmp_path: Path):
    (tmp_path / "bigbench-1.0.0").mkdir()
    assert bigbench.families(tmp_path) == tmp_path / "bigbench-1.0.0"


def wrangling(folder: Path) -> Path:
    names = [f"{function}_{i}_dates" for function in "abcdefghij" for i in (1, 2)]
    tasks = {f"mult_data_wrangling/{name}_{style}": DATES for name in names for style in (1, 2)}
    tasks["mult_data_wrangling/empty_1_dates_1"] = [(f"'{i}'", "''") for i in range(40)]
    tasks["mult_data_wrangling/a_na_emails_1"] = [("'x@y.z', 'y'", "'X', 'Y'")] * 2 + DATES
    bigbench.unpack(bigbench_archive(folder, tasks), folder)
    return folder / "mult_data_wrangling"


def test_variants_of_a_function_are_in_one_split(tmp_path: Path):
    splits = data_wrangling.tasks_of(wrangling(tmp_path), 0)
    tasks = {name: rows for found in splits.values() for name, rows in found.items()}
    assert len(tasks) == 21  # the first style alone, and nothing that is empty
    functions = [{name.split("_")[0] for name in found} for found in splits.values()]
    assert [len(found) for found in functions] == [6, 2, 2]
    assert not functions[0] & functions[1] | functions[0] & functions[2] | functions[1] & functions[2]
    assert tasks["a_1_dates"][:2] == [
        {"input": "290386", "target": "29-03-86"},
        {"input": "25 03 74", "target": "25-03-74"},
    ]
    assert tasks["a_na_emails"][0] == {"input": "x@y.z | y", "target": "X | Y"}
    assert len(tasks["a_na_emails"]) == 33


def facts() -> list[tuple[str, str]]:
    found = [(f"The capital of {i} is", f"city {i}") for i in range(150)]
    found += [(f"{i} is capital of", f"land {i % 30}") for i in range(60)]
    found += [(f"The genre of {i} is", "rock" if i % 2 else f"genre {i}") for i in range(80)]
    found += [(f"The voice type of {i} is", "tenor") for i in range(80)]
    return [*found, ("The religion of somebody is", "none"), ("The developer of this is", "them")]


def test_one_task_a_relation():
    splits = question_answering.tasks_of(facts(), 0)
    assert {part: list(tasks) for part, tasks in splits.items()} == {
        "train": ["capital", "capital of"],
        "validation": [],
        "test": ["genre"],
    }
    capitals = splits["train"]["capital"]
    assert len(capitals) == question_answering.ROWS
    assert all(row["answer"] == f"city {row['question'].split()[3]}" for row in capitals)


def test_no_answer_has_more_than_its_share():
    (genre,) = question_answering.tasks_of(facts(), 0)["test"].values()
    assert Counter(row["answer"] for row in genre).most_common(1) == [("rock", 10)]
    assert len(genre) == 50  # the 40 others, and a fifth
