"""Which tokenizer an adapter was learned with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from meta_peft.errors import MetaPeftError
from meta_peft.utils import digests
from meta_peft.utils.checked import text, whole

logger = logging.getLogger("meta_peft")
SAMPLE = "Translate 12,5 kg (2024-03-05) to naïve English:\nA b."
LONGEST = 1000  # of a sample in tokens: no tokenizer makes more of it than it has bytes


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a tokenizer does with a sample, well enough to tell one with another vocabulary or other special tokens.

    Args:
        tokens: those of `SAMPLE`, without special ones.
        end: the token that ends an answer; None where there is none.
        chat_template: a digest of it; None where there is none.
    """

    tokens: tuple[int, ...]
    end: int | None
    chat_template: str | None

    def __post_init__(self) -> None:
        if len(self.tokens) > LONGEST:
            raise MetaPeftError(f"tokenizer.tokens must be at most {LONGEST} tokens; got {len(self.tokens)}.")
        for token in (*self.tokens, *(() if self.end is None else (self.end,))):
            whole("tokenizer", token, 0, 2**31)
        if self.chat_template is not None:
            text("tokenizer.chat_template", self.chat_template, 100)

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerIdentity:
        template = getattr(tokenizer, "chat_template", None)  # several by name, with some tokenizers
        return cls(
            tuple(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]),
            tokenizer.eos_token_id,
            None if template is None else digests.of_texts(str(template)),
        )

    def check(self, other: TokenizerIdentity) -> None:
        """Raise unless `other` makes the same tokens; another chat template, which few rows are put into, is said."""
        if self.tokens != other.tokens or self.end != other.end:
            what = "ends an answer with another token" if self.tokens == other.tokens else "splits texts otherwise"
            raise MetaPeftError(
                f"The adapter was learned with another tokenizer: that of the base {what} ({other.end}, in training"
                f" {self.end}). Give the one it was learned with: load(..., tokenizer=...)."
            )
        if self.chat_template != other.chat_template:
            logger.warning(
                "The adapter was learned with another chat template than this tokenizer's. If its rows are conversations,"
                " give the tokenizer it was learned with: load(..., tokenizer=...)."
            )
