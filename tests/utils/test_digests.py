from __future__ import annotations

import hashlib
from pathlib import Path

from meta_peft.utils import digests


def test_a_file_longer_than_a_part(tmp_path: Path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert digests.of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_texts_are_kept_apart():
    assert digests.of_texts("ab") == hashlib.sha256(b"ab").hexdigest()[:32]
    assert digests.of_texts("a", "b") != digests.of_texts("ab")
    assert len(digests.of_texts("\ud800")) == 32
