from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from meta_peft.utils import digests


def test_a_file_longer_than_a_part(tmp_path: Path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert digests.of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_texts_are_kept_apart():
    assert digests.of_texts("ab") == hashlib.sha256(b"ab").hexdigest()[:32]
    assert digests.of_texts("a", "b") != digests.of_texts("ab")
    assert len(digests.of_texts("\ud800")) == 32


def test_a_sample_of_a_small_file_is_all_of_it(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    assert digests.of_sample(tmp_path / "file") == digests.of_file(tmp_path / "file")


def test_a_sample_has_the_size_both_ends_and_places_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "BLOCKS", 5)
    monkeypatch.setattr(digests, "BLOCK", 10)
    file, content = tmp_path / "file", bytes(1000)
    seen = set()
    for changed in (None, 0, 500, 999):
        written = bytearray(content)
        if changed is not None:
            written[changed] = 1
        file.write_bytes(written)
        seen.add(digests.of_sample(file))
    file.write_bytes(content + b"\0")
    seen.add(digests.of_sample(file))
    assert len(seen) == 5
    file.write_bytes(content)
    assert digests.of_sample(file) in seen, "the same file has the same digest"
