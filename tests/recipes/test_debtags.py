from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from debtags import ROWS_PER_LABEL, WAYS, draws_of, main, tagged, tasks_of

REAL = """Package: yelp-tools
Depends: python3:any, itstool
Description: Yelp documentation tools
Tag: devel::docsystem, interface::commandline, role::program,
 scope::utility
Section: gnome

Package: untagged
Description: nothing: but this

Package: yelp-tools-extra
Tag: works-with::text
Description: Yelp documentation tools
"""


def test_package_lists_are_read():
    expected = {"devel::docsystem", "interface::commandline", "role::program", "scope::utility", "works-with::text"}
    assert tagged(REAL) == {"Yelp documentation tools": expected}


def package_list() -> str:
    """Ten facets with three tags each; the first tag of each is on its own packages alone, as are the others."""
    lines = []
    for facet in "abcdefghij":
        for tag in ("one", "two", "rare"):
            n = 5 if tag == "rare" else 30
            lines += [
                f"Package: p\nDescription: {facet} {tag} {i}\nTag: {facet}::{tag}, role::program\n" for i in range(n)
            ]
    return "\n".join(lines)


def test_a_task_is_a_tag_and_the_others_of_its_facet():
    splits = tasks_of(package_list(), 0)
    assert [len(tasks) for tasks in splits.values()] == [12, 4, 4]  # all have role::program, and few the rare ones
    facets = [{tag[0] for tag in tasks} for tasks in splits.values()]
    assert not facets[0] & facets[1] | facets[0] & facets[2] | facets[1] & facets[2]
    for tasks in splits.values():
        for tag, rows in tasks.items():
            facet, _, name = tag.partition("::")
            assert Counter(row["label"] for row in rows) == {"yes": ROWS_PER_LABEL, "no": ROWS_PER_LABEL}
            for row in rows:
                assert row["text"].startswith(f"{facet} ")
                assert row["label"] == ("yes" if row["text"].split()[1] == name else "no")


def test_classes_are_four_tags_and_packages_with_one_of_them_alone():
    """Each package of a facet has its tag, every third of them the next one too, which makes it nobody's example."""
    lines = []
    for facet in "abcdefghijklmnopqrst":
        for tag, other in (("one", "two"), ("two", "one")):
            lines += [
                f"Package: p\nDescription: {facet} {tag} number {i}\nTag: {facet}::{tag}"
                + (f", {facet}::{other}" if i % 3 == 0 else "")
                + "\n"
                for i in range(90)
            ]
    splits = draws_of("\n".join(lines), 0)
    facets = [{tag[0] for name in tasks for tag in name.split()} for tasks in splits.values()]
    assert not facets[0] & facets[1] | facets[0] & facets[2] | facets[1] & facets[2]
    assert all(splits.values())
    for tasks in splits.values():
        for name, rows in tasks.items():
            drawn = name.split()
            assert len(set(drawn)) == WAYS
            assert Counter(row["label"] for row in rows) == dict.fromkeys(drawn, ROWS_PER_LABEL)
            assert len({row["text"] for row in rows}) == WAYS * ROWS_PER_LABEL
            for row in rows:
                facet, tag, _, i = row["text"].split()
                has = {f"{facet}::{tag}"} | ({f"{facet}::one", f"{facet}::two"} if int(i) % 3 == 0 else set())
                assert has & set(drawn) == {row["label"]}


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "Packages").write_text(package_list(), encoding="utf-8")
    made = tmp_path / "made"
    assert main([str(made), "--packages", str(tmp_path / "Packages")]) == 0
    rows = [json.loads(line) for line in (made / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 * ROWS_PER_LABEL
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tmp_path / "not-made")]) == 2
    assert "There is no apt-cache on this machine" in capsys.readouterr().err
    assert not (tmp_path / "not-made").exists()
