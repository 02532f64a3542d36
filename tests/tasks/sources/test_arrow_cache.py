from __future__ import annotations

from pathlib import Path

import pytest

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources import arrow_cache
from meta_peft.tasks.sources.arrow_cache import cached, key_of_files, table_of, uncached


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrow_cache, "ROWS_AT_ONCE", 2)


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": "x", "b": i} for i in range(5)],
        [{"a": None}, {"a": None}, {"a": "x"}, {"a": None}],  # nothing at first, then text
        [{"a": 1}, {"a": 2}, {"a": 2.5}, {"a": 3}],
        [{"a": "x"}, {"a": "y"}, {"a": "z", "b": "late"}, {"b": "alone"}, {"a": "w"}],
        [{"a": {"en": "x"}}, {"a": {"en": "y"}}, {"a": {"en": "z", "de": "w"}}],
        [{"a": []}, {"a": []}, {"a": [{"role": "user", "content": "x"}]}],
    ],
)
def test_a_table_has_the_rows_that_were_written(rows: list[dict]):
    """Whatever the first rows had, and the columns of all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for table in (uncached(iter(rows)), uncached(rows)):
        assert table.column_names == columns
        for row, found in zip(rows, table, strict=True):
            for name in columns:
                expected = row.get(name)
                found_value = found[name]
                if isinstance(expected, dict):
                    found_value = {k: v for k, v in found_value.items() if v is not None}
                assert found_value == expected


def test_keys_that_are_nothing_in_one_object_and_not_there_in_another():
    """As in conversations of which only some turns call a tool: a cast by pyarrow makes an array that it cannot read."""
    turns = [[{"role": "user", "calls": None}, {"role": "assistant"}], [{"role": "user", "calls": "x"}]]
    found = uncached([{"messages": turns[0]}, {"messages": turns[0]}, {"messages": turns[1]}])["messages"]
    assert [[(turn["role"], turn["calls"]) for turn in row] for row in found] == [
        *[[("user", None), ("assistant", None)]] * 2,
        [("user", "x")],
    ]


def test_what_was_made_once_is_found_again(tmp_path: Path):
    made = []

    def rows():
        made.append(1)
        yield {"a": str(tmp_path)}

    first, again = (cached(str(tmp_path), rows) for _ in range(2))
    assert made == [1]
    assert first[0] == again[0] == {"a": str(tmp_path)}
    assert first._fingerprint == again._fingerprint
    cached(f"{tmp_path} other", rows)
    assert made == [1, 1]


def test_a_file_that_was_changed_is_another(tmp_path: Path):
    path = tmp_path / "x.txt"
    keys = []
    for content in ("one", "two", "one"):  # in one moment, and of one length
        path.write_text(content)
        keys.append(key_of_files([path]))
    assert keys[0] == keys[2] != keys[1]


def test_a_failed_writing_leaves_nothing(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="do not make a table"):
        arrow_cache.write([{"a": 1}, {"a": 2}, {"a": "x"}], tmp_path / "x.arrow")
    with pytest.raises(MetaPeftError, match="There are no rows"):
        arrow_cache.write([], tmp_path / "x.arrow")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, {"a": "x"}], "column 'a' holds a number in row 11 and text in row 12"),
        ([{"a": None}, {"a": "x"}, {"a": ["x"]}], "column 'a' holds text in row 12 and a list in row 13"),
        ([{"a": True}, {"a": 1}], "column 'a' holds true or false in row 11 and a number in row 12"),
        ([{"a": 10**30}], "column 'a': "),
        ([{"a": "\ud800"}], "column 'a': "),
        ([{"a\0b": 1}], "a name with a NUL character"),
    ],
)
def test_mixed_types_are_named_by_column_and_row(rows: list[dict], message: str):
    with pytest.raises(MetaPeftError, match=message):
        table_of(rows, first=10)


def test_mixed_types_far_apart():
    with pytest.raises(MetaPeftError, match="after row 2 the values are of another kind"):
        uncached([{"a": 1}, {"a": 2}, {"a": "x"}])


@pytest.mark.parametrize(("early", "late"), [(2**60 + 1, 0.5), ([2**60 + 1], [0.5]), ({"b": 2**60 + 1}, {"b": 0.5})])
def test_numbers_that_fit_no_column_far_apart(tmp_path: Path, early, late):
    """A later row makes fractions of a column, which whole numbers beyond 2^53 cannot be."""
    with pytest.raises(MetaPeftError, match=r"do not make a table \(column 'a': .*nteger value 1152921504606846977"):
        arrow_cache.write([{"a": early}, {"a": early}, {"a": late}], tmp_path / "x.arrow")
    assert not list(tmp_path.iterdir())
