from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from surface import run_python, tiny_folder, tiny_tokenizer

from meta_peft.base import load_tokenizer
from meta_peft.errors import MetaPeftError
from meta_peft.tasks import EpisodeDataset, task_set
from meta_peft.tasks.encoding import Encoding, Facts
from meta_peft.tasks.prompt import PromptFormat
from meta_peft.tasks.task_set import TaskSet


def rows(n: int, prefix: str = "") -> list[dict]:
    return [{"input": f"{prefix}{i}", "target": str(i)} for i in range(n)]


MAPPING = {"b": rows(3), "a": rows(2)}
FLAT = [{**row, "task": task} for task, its_rows in MAPPING.items() for row in its_rows]


def contents(tasks: TaskSet) -> dict:
    return {t: [{"input": r["input"], "target": r["target"]} for r in tasks.rows(t)] for t in tasks.names}


def test_of_whatever_holds_tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in FLAT) + "\n\n", encoding="utf-8")
    same = TaskSet.from_mapping(MAPPING)
    for source in (MAPPING, FLAT, iter(FLAT), Dataset.from_list(FLAT), path, str(path), same):
        tasks = TaskSet.of(source)
        assert tasks.names == ["b", "a"]
        assert len(tasks) == 2
        assert contents(tasks) == MAPPING
    assert TaskSet.of(same) is same


def test_rows_of_a_task_need_not_be_together():
    mixed = TaskSet.from_rows([FLAT[0], FLAT[3], FLAT[1], FLAT[4], FLAT[2]])
    assert contents(mixed) == MAPPING


def test_task_column_has_any_name_and_values():
    tasks = TaskSet.from_rows([{**row, "language": i % 2} for i, row in enumerate(rows(4))], "language")
    assert tasks.names == ["0", "1"]
    with pytest.raises(MetaPeftError, match=r"Expected a column 'task' .*\['input', 'target'\].*with task_column"):
        TaskSet.from_rows(rows(2))


def test_repeated_rows_are_left_out():
    """Whatever else differs: support and query must never share an example. Other tasks may have the same one."""
    tasks = TaskSet.from_rows([*FLAT, {**FLAT[0], "task": "c"}, {**FLAT[0]}, {**FLAT[4]}])
    assert {t: len(r) for t, r in tasks.rows_of.items()} == {"b": 3, "a": 2, "c": 1}
    assert tasks.repeated_rows == 2
    noted = TaskSet.from_rows([{**FLAT[0], "id": i} for i in range(3)])
    assert noted.repeated_rows == 2


def test_repeated_conversations_are_left_out():
    turns = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": y}] for y in "aba"]
    tasks = TaskSet.from_rows([{"task": "t", "messages": m} for m in turns])
    assert tasks.repeated_rows == 1


def test_select():
    assert contents(TaskSet.from_mapping(MAPPING).select(["a"])) == {"a": MAPPING["a"]}
    assert TaskSet.from_mapping(MAPPING).select(["a", "b"]).names == ["a", "b"]


def test_too_few_rows_names_the_task_and_the_numbers():
    tasks = TaskSet.from_mapping(MAPPING)
    tasks.check_rows(1, 1)
    with pytest.raises(
        MetaPeftError, match=r"Task 'a' has 2 distinct rows.* 2 support rows and 1 query rows \(3 in all\)"
    ):
        tasks.check_rows(2, 1)


def test_tasks_in_both_sets():
    tasks = TaskSet.from_mapping(MAPPING)
    tasks.check_disjoint(TaskSet.from_mapping({"c": rows(1)}))
    with pytest.raises(MetaPeftError, match=r"1 tasks are in both the training and the evaluation tasks, 'a' for one"):
        tasks.check_disjoint(tasks.select(["a"]))
    with pytest.raises(MetaPeftError, match="2 tasks are in both the x and the y tasks"):
        tasks.check_disjoint(tasks, ("x", "y"))


def test_no_rows():
    with pytest.raises(MetaPeftError, match="no rows"):
        TaskSet(Dataset.from_dict({"task": [], "input": [], "target": []}))


def test_unknown_columns():
    with pytest.raises(MetaPeftError, match=r"Expected columns .*the columns are \['task', 'x'\]"):
        TaskSet.from_rows([{"task": "a", "x": 1}])


class Letters:
    """A tokenizer: one token a character."""

    eos_token_id, bos_token_id = 1, None

    def __call__(self, text: str, add_special_tokens: bool):
        return {"input_ids": [ord(c) for c in text]}


def test_encoded_keeps_tasks_and_drops_text():
    tasks = TaskSet.from_rows([*FLAT, FLAT[0]])
    encoded = tasks.encoded(PromptFormat(), Letters(), 99)
    assert encoded.names == tasks.names
    assert {t: r.tolist() for t, r in encoded.rows_of.items()} == {t: r.tolist() for t, r in tasks.rows_of.items()}
    assert set(encoded.dataset.column_names) == {"task", "input_ids", "labels"}
    assert [{**r} for r in encoded.rows("a")] == [
        {"task": "a", **PromptFormat().encode(row, Letters(), 99)} for row in MAPPING["a"]
    ]
    assert set(tasks.dataset.column_names) == {"task", "input", "target"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"task": "a", "input": ' + "9" * 5000 + ', "target": "x"}'], "line 1: not JSON .*4300"),
        (["[" * 10**5], "line 1: not JSON .*recursion"),
        (['{"task": "a", "input": 99999999999999999999999, "target": "x"}'], "do not make a table"),
        (['{"task": "a", "input": "\\ud800", "target": "x"}'], "do not make a table"),
        (
            ['{"task": "a", "input": 1, "target": "x"}', '{"task": "a", "input": "b", "target": "x"}'],
            "the same kind of",
        ),
        (['{"task": {"": 1, "\\u0000": 2}, "input": "a", "target": "x"}'], "a name with a NUL character"),
        (['{"task": null, "input": "a", "target": "x"}'], "Row 1 has None in the column 'task': name its task"),
        (['{"task": "", "input": "a", "target": "x"}'], "Row 1 has '' in the column 'task'"),
        (['{"task": ["a"], "input": "a", "target": "x"}'], r"Row 1 has \['a'\] in the column 'task'"),
    ],
    ids=range(9),
)
def test_rows_that_make_no_tasks(tmp_path, lines: list[str], message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(MetaPeftError, match=message) as error:
        TaskSet.from_jsonl(path)
    assert len(str(error.value)) < 1000


def test_no_file(tmp_path):
    with pytest.raises(MetaPeftError, match=r"There is no file '.*absent.jsonl'"):
        TaskSet.of(tmp_path / "absent.jsonl")


# ---- tokens


def on_disk(tmp_path, n: int = 6) -> TaskSet:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"task": "a", **row}) + "\n" for row in rows(n)), encoding="utf-8")
    return TaskSet.of(path)


COUNTING = """
import sys
from meta_peft.base import load_tokenizer
from meta_peft.tasks import PromptFormat, TaskSet
from meta_peft.tasks.encoding import Encoding
calls = []
once = Encoding.__call__
Encoding.__call__ = lambda self, row: calls.append(1) or once(self, row)
for max_length in map(int, sys.argv[3:]):
    tasks = TaskSet.of(sys.argv[1])
    for some in (tasks, tasks.select(["a"])):
        encoded = some.encoded(PromptFormat(), load_tokenizer(sys.argv[2]), max_length)
        print(len(calls), encoded.rows("a")[0]["labels"][-1])
        calls.clear()
"""


def test_a_second_run_does_not_tokenise_again(tmp_path):
    """Another process, with a tokenizer of its own, of all tasks and of some; a changed option does."""
    tasks, tokenizer = on_disk(tmp_path), load_tokenizer(str(tiny_folder()))
    for some in (tasks, tasks.select(["a"])):
        some.encoded(PromptFormat(), tokenizer, 20)
    arguments = [str(tmp_path / "tasks.jsonl"), str(tiny_folder())]
    assert run_python(COUNTING, *arguments, "20", "21") == "0 1\n" * 2 + "6 1\n" * 2


@pytest.mark.parametrize("left", [0, 100, -50])
def test_files_of_the_cache_that_were_damaged_are_made_again(tmp_path, left: int):
    """As a disk that was full, or a machine that went down, leaves them."""
    tokenizer = tiny_tokenizer()
    before = on_disk(tmp_path).encoded(PromptFormat(), tokenizer, 20).rows("a")
    files = [file["filename"] for file in on_disk(tmp_path).dataset.cache_files]
    files += [file["filename"] for file in on_disk(tmp_path).encoded(PromptFormat(), tokenizer, 20).dataset.cache_files]
    assert len(files) == 2
    for name in files:
        whole = Path(name).read_bytes()
        aside = tmp_path / "part"  # whoever has mapped the old file into memory goes on with that
        aside.write_bytes(whole[:left])
        aside.replace(name)
    assert on_disk(tmp_path).encoded(PromptFormat(), tokenizer, 20).rows("a") == before


def test_tokenising_in_several_processes(tmp_path):
    tasks = on_disk(tmp_path)
    one, two = (tasks.encoded(PromptFormat(), tiny_tokenizer(), 20 + n, num_proc=n) for n in (1, 2))
    assert one.rows("a") == two.rows("a")


def test_cut_rows_are_counted_once(tmp_path, caplog):
    """Rows of exactly `max_length` tokens are not cut."""
    tasks = TaskSet.from_rows([{"task": "a", "input": "x" * n, "target": "y"} for n in (1, 2, 3, 4)])
    longest = len(PromptFormat().encode({"input": "xx", "target": "y"}, tiny_tokenizer(), 99)["input_ids"])
    with caplog.at_level("WARNING", "meta_peft"):
        encoded = tasks.encoded(PromptFormat(), tiny_tokenizer(), longest)
    assert tasks.found["cut_rows"] == 2
    assert caplog.messages == [f"2 of 4 rows are longer than max_length={longest} and lost the start of their prompt."]
    assert set(encoded.dataset.column_names) == {"task", "input_ids", "labels"}


def test_cut_rows_of_some_tasks_are_counted_where_they_are_from():
    """As those of the held-out tasks that a comparison draws, which are encoded alone; each row once."""
    long = {t: [{"input": "x" * 30, "target": y} for y in "yzw"[:n]] for n, t in enumerate("abc", 1)}
    tasks = TaskSet.from_mapping(long)
    parts = tasks.split([0.7, 0.3])
    assert "cut_rows" not in tasks.found
    found = tasks.found  # what is kept for results.json, before any row is encoded
    some = [tasks.select(names) for names in ("ab", "b")]
    for part in some:
        part.encoded(PromptFormat(), tiny_tokenizer(), 12)
    assert [each["cut_rows"] for each in (some[0].found, some[1].found, found)] == [3, 2, 3]
    for part in parts:
        part.encoded(PromptFormat(), tiny_tokenizer(), 12)
    assert found["cut_rows"] == 6
    assert {t: tasks.select([t]).found["cut_rows"] for t in "abc"} == {"a": 1, "b": 2, "c": 3}
    tasks.encoded(PromptFormat(), tiny_tokenizer(), 99)
    assert found["cut_rows"] == 0


def test_cut_rows_of_tasks_that_were_not_encoded_are_not_known():
    """Those of another part of the same tasks say nothing of them."""
    long = [{"input": "x" * 30, "target": target} for target in "yz"]
    encoded, other = TaskSet.from_mapping({"a": long, "b": long}).split([0.5, 0.5])
    encoded.encoded(PromptFormat(), tiny_tokenizer(), 12)
    assert encoded.found["cut_rows"] == 2
    assert "cut_rows" not in other.select(other.names).found
    assert "cut_rows" not in other.found


def test_rows_of_words_that_lost_some_are_counted(caplog):
    """A word that does not fit may be of more tokens than one, and so may leave room for one."""
    long = "abcde"
    words = [[long], ["a", "b"], ["a", long], [long, "b"], ["a", "b", long], ["a", "b", "a", "b", "a"]]
    tasks = TaskSet.from_rows([{"task": "t", "tokens": row, "tags": [0] * len(row)} for row in words])
    how = Encoding("token_classification", PromptFormat(), tiny_tokenizer(), 8, Facts(num_labels=2))
    with caplog.at_level("WARNING", "meta_peft"):
        encoded = tasks.encoded(how)
    read = [sum(label >= 0 for label in row["labels"]) for row in encoded.rows("t")]
    assert tasks.found["cut_rows"] == sum(n < len(row) for n, row in zip(read, words, strict=True)) > 1
    assert caplog.messages == [
        f"{tasks.found['cut_rows']} of 6 rows are longer than max_length=8 and lost words at their end."
    ]


def test_rows_whose_longest_choice_does_not_fit_are_counted():
    """All choices stand behind the same prompt, so that the row itself may be shorter."""
    row = {"task": "a", "input": "xxxxxxxx", "target": "y", "choices": ["y", "z" * 9]}
    tasks = TaskSet.from_rows([row, {**row, "choices": ["y", "z"]}, {**row, "choices": None, "input": "x"}])
    tasks.encoded(PromptFormat(), tiny_tokenizer(), 18)
    assert tasks.found["cut_rows"] == 1


def test_a_row_that_cannot_be_encoded_is_of_a_task():
    tasks = TaskSet.from_rows([{"task": "a", "input": "x", "target": "y" * 50}])
    with pytest.raises(MetaPeftError, match=r"does not fit max_length=20.*\(In task 'a'.\)"):
        tasks.encoded(PromptFormat(), tiny_tokenizer(), 20)


def test_rows_of_a_large_table_are_encoded_when_they_are_drawn(tmp_path, monkeypatch):
    """The same rows; but not all of them."""
    tasks = on_disk(tmp_path)
    whole = tasks.encoded(PromptFormat(), tiny_tokenizer(), 20)
    calls = []
    once = Encoding.__call__
    monkeypatch.setattr(task_set, "LARGE", 5)
    monkeypatch.setattr(Encoding, "__call__", lambda self, row: calls.append(1) or once(self, row))
    some = tasks.encoded(PromptFormat(), tiny_tokenizer(), 20, rows_drawn=5)
    assert not calls
    episodes = [EpisodeDataset(t, shots=1, query_size=1)[0] for t in (whole, some)]
    assert episodes[0] == episodes[1]
    assert len(calls) == 2
    assert len(tasks.encoded(PromptFormat(), tiny_tokenizer(), 22, rows_drawn=6).rows("a")) == 6
    assert len(calls) == 2 + 6


def test_rows_with_something_in_a_column_that_no_row_needs():
    """Those without are counted as empty, beside those that are so by themselves."""
    kinds = ["p", None, "q", "", "p", "p"]
    rows = [{"task": "ab"[i > 3], "input": f"{i}", "target": "x", "kind": kind} for i, kind in enumerate(kinds)]
    rows.append({"task": "a", "input": "", "target": "x", "kind": "p"})
    tasks = TaskSet.of(rows, empty_rows="leave_out")
    assert {task: numbers.tolist() for task, numbers in tasks.rows_with("kind").items()} == {"a": [0, 2], "b": [4, 5]}
    full = tasks.having("kind")
    assert {task: [row["input"] for row in full.rows(task)] for task in full.names} == {
        "a": ["0", "2"],
        "b": ["4", "5"],
    }
    assert (full.found["rows"], full.found["tasks"], full.found["empty_rows"]) == (7, 2, 3)
    assert tasks.found["empty_rows"] == 1
    assert full.having("kind") is full
    with pytest.raises(MetaPeftError, match="Task 'a' has a row with nothing in the column 'kind'"):
        TaskSet.of(rows[:6]).having("kind")


@pytest.mark.parametrize("empty", [None, ""])
def test_rows_that_were_left_out_are_not_encoded(empty: str | None, caplog):
    """Neither what is empty nor what is repeated, which would be counted as cut once more."""
    long, short = {"input": "x" * 9, "target": "y"}, {"input": "x", "target": "y"}
    mixed = [{"input": "x", "target": empty}, long, long, {"input": empty, "target": "y"}, short]
    kept = [long, short]
    assert TaskSet.of([{"task": "a", **row} for row in mixed], empty_rows="leave_out").found["empty_rows"] == 2
    for form in (mixed, kept):
        tasks = TaskSet.of([{"task": t, **row} for t in "ab" for row in form], empty_rows="leave_out")
        caplog.clear()
        encoded = tasks.encoded(PromptFormat(), tiny_tokenizer(), 8)
        assert caplog.messages == ["2 of 4 rows are longer than max_length=8 and lost the start of their prompt."]
        assert contents(tasks) == {"a": kept, "b": kept}
        expected = [PromptFormat().encode(row, tiny_tokenizer(), 8) for row in kept]
        assert {t: encoded.rows(t) for t in "ab"} == {t: [{"task": t, **row} for row in expected] for t in "ab"}


def test_a_table_of_which_nothing_is_left_out_stays_what_it_was():
    table = Dataset.from_list(FLAT)
    assert TaskSet(table).table is table


def test_rows_left_out_of_a_table_on_disk(tmp_path, monkeypatch):
    """Its rows are mapped from there still, and those encoded are found again."""
    path = tmp_path / "tasks.jsonl"
    lines = [{"task": "a", **row} for row in (*rows(3), {"input": "x", "target": None}, *rows(5))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    calls = []
    once = Encoding.__call__
    monkeypatch.setattr(Encoding, "__call__", lambda self, row: calls.append(1) or once(self, row))
    for times in (5, 0):
        tasks = TaskSet.of(path, empty_rows="leave_out")
        assert tasks.table.cache_files
        assert contents(tasks) == {"a": rows(5)}
        tasks.encoded(PromptFormat(), tiny_tokenizer(), 23)
        assert len(calls) == times
        calls.clear()
    monkeypatch.setattr(task_set, "LARGE", 2)
    drawn = tasks.encoded(PromptFormat(), tiny_tokenizer(), 24, rows_drawn=1)
    assert len(drawn.rows("a")) == len(calls) == 5


# ---- choosing tasks


def test_splits_are_disjoint_and_by_the_seed():
    tasks = TaskSet.from_mapping({str(t): rows(2) for t in range(10)})
    parts = tasks.split([0.5, 0.3, 0.2], seed=1)
    assert [len(part) for part in parts] == [5, 3, 2]
    assert sorted(name for part in parts for name in part.names) == sorted(tasks.names)
    assert [part.names for part in tasks.split([0.5, 0.3, 0.2], seed=1)] == [part.names for part in parts]
    assert [part.names for part in tasks.split([0.5, 0.3, 0.2], seed=2)] != [part.names for part in parts]
    with pytest.raises(MetaPeftError, match=r"10 tasks cannot be split into 0.98, 0.01, 0.01 of them: a part"):
        tasks.split([0.98, 0.01, 0.01])


def test_small_tasks_are_left_out_and_counted():
    tasks = TaskSet.from_mapping(MAPPING)
    left = tasks.only(tasks.enough(2, 1))
    assert contents(left) == {"b": MAPPING["b"]}
    assert (left.found["small_tasks"], left.found["tasks"]) == (1, 1)
    assert tasks.only(tasks.names) is tasks
    with pytest.raises(MetaPeftError, match="None of the 2 tasks has rows enough"):
        tasks.only(tasks.enough(3, 1))


def test_what_was_found():
    tasks = TaskSet.from_rows([*FLAT, FLAT[0], {**FLAT[0], "task": "c"}])
    assert tasks.found == {
        "rows": 7,
        "tasks": 3,
        "repeated_rows": 1,
        "empty_rows": 0,
        "rows_in_several_tasks": 5,  # of 0 there are three, and of 1 two
        "single_label_tasks": 0,
    }
