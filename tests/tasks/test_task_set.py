from __future__ import annotations

import json

import pytest
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.prompt import PromptFormat
from meta_peft.tasks.task_set import TaskSet, read_jsonl


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
    assert encoded.rows_of == tasks.rows_of
    assert set(encoded.dataset.column_names) == {"task", "input_ids", "labels"}
    assert [{**r} for r in encoded.rows("a")] == [
        {"task": "a", **PromptFormat().encode(row, Letters(), 99)} for row in MAPPING["a"]
    ]
    assert set(tasks.dataset.column_names) == {"task", "input", "target"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task": 1}\n{"task": \n', r"tasks.jsonl, line 2: not JSON"),
        ('{"task": 1}\n\n[1, 2]\n', r"tasks.jsonl, line 3: expected an object with columns, got '\[1, 2\]'"),
        ("\n \n", r"tasks.jsonl has no rows"),
        (b"\xff\xfe{}", r"tasks.jsonl is not UTF-8 text \(invalid start byte at byte 0\)"),
    ],
)
def test_bad_files(tmp_path, content, message: str):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MetaPeftError, match=message):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"task": "a", "input": ' + "9" * 5000 + ', "target": "x"}'], "line 1: not JSON .*4300 digits"),
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


def test_characters_that_end_a_line_elsewhere_are_content(tmp_path):
    """JSON lines end at newlines only; U+2028 and its like may stand inside a string."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        json.dumps({"task": "a", "input": "x\u2028y\x85z", "target": "1"}, ensure_ascii=False) + "\r\n", "utf-8"
    )
    assert read_jsonl(path)[0]["input"] == "x\u2028y\x85z"
