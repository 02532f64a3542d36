"""What is worth saying, and not twice."""

from __future__ import annotations

import logging

logger = logging.getLogger("meta_peft")
_said: set[str] = set()


def say_once(message: str) -> None:
    """Log `message` the first time it is given in this process."""
    if message not in _said:
        _said.add(message)
        logger.info(message)
