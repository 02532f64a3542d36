from __future__ import annotations

import pytest

from meta_peft import MetaPeftError
from meta_peft.processes.group import _sendable, of_first


class UnsendableError(OSError):
    """As of a library whose errors need more than their words to be made again."""

    def __init__(self, words: str, *, response: object):
        super().__init__(words)


def test_an_error_that_other_processes_can_read_stays_as_it_is():
    error = MetaPeftError("no such file")
    assert _sendable(error) is error


def test_of_one_that_they_cannot_the_words_are_sent():
    sent = _sendable(UnsendableError("no connection", response=None))
    assert isinstance(sent, MetaPeftError)
    assert str(sent) == "UnsendableError: no connection"

    def broken() -> None:
        raise UnsendableError("no connection", response=None)

    with pytest.raises(MetaPeftError, match="UnsendableError: no connection"):
        of_first(broken)
