from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from surface import tiny_tokenizer

from meta_peft import Encoding, EpisodeCollator, EpisodeDataset, MetaPeftError, PromptFormat, TaskSet

ROW = {"question": "what?", "choices": ["yes", "no", "maybe"], "answer": 1}


def encode(row: Mapping[str, Any], max_length: int = 64) -> dict[str, Any]:
    return Encoding("causal_lm", PromptFormat("{input} ->", " {target}"), tiny_tokenizer(), max_length)(row)


@pytest.mark.parametrize("answer", [1, "no"])
def test_the_right_answer_is_learned_and_all_are_kept(answer: int | str):
    features = encode({**ROW, "answer": answer})
    plain = encode({"question": "what?", "answer": "no"})
    assert {name: features[name] for name in plain} == plain
    tokenizer = tiny_tokenizer()
    assert [tokenizer.decode(tokens) for tokens in features["choices"]] == [" yes</s>", " no</s>", " maybe</s>"]


@pytest.mark.parametrize("columns", [("input", "target"), ("text", "label"), ("prompt", "completion")])
def test_in_any_form_of_row(columns: tuple[str, str]):
    first, second = columns
    features = encode({first: "ab", second: 0, "choices": ["c", "d"]})
    assert features["labels"][-2:] == features["choices"][0][-2:]


def test_all_answers_follow_one_prompt():
    """It is cut as much as the longest answer asks for."""
    longest = encode({"question": "abcdefgh", "answer": "maybe"}, 14)
    features = encode({"question": "abcdefgh", "choices": ["maybe", "no"], "answer": "no"}, 14)
    prompt = longest["input_ids"][: -len(features["choices"][0])]
    assert features["input_ids"] == prompt + features["choices"][1]
    assert features["labels"] == [-100] * len(prompt) + features["choices"][1]
    assert len(longest["input_ids"]) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, r"Column 'answer' must hold one of the choices, or its number from 0 to 2; got 3 for \['yes',"),
        ({"answer": -1}, "or its number from 0 to 2; got -1"),
        ({"answer": True}, "or its number from 0 to 2; got True"),
        ({"answer": "Yes"}, "or its number from 0 to 2; got 'Yes'"),
        ({"answer": None}, "or its number from 0 to 2; got None"),
        ({"choices": "yes"}, "Column 'choices' must hold a list of texts, none of them empty; got 'yes'"),
        ({"choices": ["yes", ""]}, "must hold a list of texts, none of them empty"),
        ({"choices": ["yes", 3]}, "must hold a list of texts"),
        ({"choices": ["yes"]}, r"must hold two or more different texts; got \['yes'\]"),
        ({"choices": ["yes", "yes"]}, "must hold two or more different texts"),
        ({"choices": ["Ä", "Ö", "x"]}, "Two of the choices .* are the same tokens"),  # both unknown to the tokenizer
    ],
)
def test_what_cannot_be_chosen_from(change: dict[str, Any], message: str):
    with pytest.raises(MetaPeftError, match=message):
        encode({**ROW, **change})


def test_from_a_table_to_a_stack():
    rows = [
        {"question": q, "choices": ["yes", "no", "maybe"][:n], "answer": 0}
        for q, n in zip("abcd", (3, 2, 3, 2), strict=True)
    ]
    tasks = TaskSet.from_mapping({"t": rows}).encoded(PromptFormat(), tiny_tokenizer(), 64)
    episode = EpisodeDataset(tasks, shots=2, query_size=2, shuffle=False)[0]
    batch = EpisodeCollator(2)([episode])
    assert set(batch.query.inputs) == {"input_ids", "attention_mask"}
    for stack, given in ((batch.support, episode.support), (batch.query, episode.query)):
        kept = [[[t for t in answer if t != -100] for answer in row] for row in stack.choices_BCL.tolist()]
        assert [[a for a in row if a] for row in kept] == [row["choices"] for row in given]
    part = batch.query.tasks(0, 1)
    assert part.choices_BCL.tolist() == batch.query.choices_BCL.tolist()


def test_rows_without_choices_beside_others():
    rows = [{"input": "ab", "target": "no", "choices": None}, {"input": "cd", "target": "no", "choices": ["yes", "no"]}]
    collated = EpisodeCollator(2).rows([[encode(row) for row in rows]])
    assert (collated.choices_BCL[0] == -100).all()
    assert [int((row != -100).sum()) for row in collated.choices_BCL[1]] == [5, 4]
    assert EpisodeCollator(2).rows([[encode(rows[0])]]).choices_BCL is None


def test_the_same_question_with_other_choices_is_another_row():
    rows = [
        {"question": "a", "choices": ["yes", "no"], "answer": 0},
        {"question": "a", "choices": ["ja", "no"], "answer": 0},
    ]
    tasks = TaskSet.from_mapping({"t": [*rows, rows[0]]})
    assert (len(tasks.rows("t")), tasks.repeated_rows) == (2, 1)
