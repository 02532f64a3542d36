"""The card as a file: one that meta_peft made may be made again, a README of somebody's own stays."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import yaml

logger = logging.getLogger("meta_peft")

CARD = "README.md"
TAG = "meta_peft"  # in the metadata of every card that meta_peft makes
HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


def is_own_card(text: str) -> bool:
    """Whether meta_peft made this card: its metadata has the tag."""
    head = HEAD.match(text)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except Exception:  # a date that cannot be is no error of YAML's own
        return False
    tags = values.get("tags") if isinstance(values, dict) else None
    return isinstance(tags, list) and TAG in tags


def may_replace(folder: Path, card: str) -> bool:
    """Whether `card` may be the README of `folder`: not if meta_peft made it and somebody else the one that is there.

    The latter is said in the log. A card that a caller wrote goes where it is asked for.
    """
    there = folder / CARD
    if not there.is_file() or is_own_card(there.read_text(encoding="utf-8", errors="replace")) or not is_own_card(card):
        return True
    logger.warning(
        "%s is no card that meta_peft made (without the tag %s in its metadata), and stays as it is: this adapter's card is"
        " not written.",
        there,
        TAG,
    )
    return False
