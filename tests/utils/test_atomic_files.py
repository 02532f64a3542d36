from __future__ import annotations

from pathlib import Path

import pytest

from meta_peft.utils.atomic_files import write_file


def test_a_text_and_what_a_function_writes(tmp_path: Path):
    assert write_file(tmp_path / "new" / "a.txt", "ä\n").read_text(encoding="utf-8") == "ä\n"
    assert write_file(tmp_path / "b.bin", lambda path: path.write_bytes(b"b")).read_bytes() == b"b"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"a.txt", "b.bin"}


def test_the_function_is_given_a_path_of_the_same_ending(tmp_path: Path):
    seen: list[Path] = []
    write_file(tmp_path / "plot.png", lambda path: (seen.append(path), path.write_text("")))
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path


def test_the_old_file_stays_where_writing_fails(tmp_path: Path):
    path = write_file(tmp_path / "a.txt", "old")

    def fails(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_file(path, fails)
    assert path.read_text() == "old"
