"""From a model's output to one loss and one score per task."""

from __future__ import annotations

from typing import Any

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.causal_lm import CAUSAL_LM
from meta_peft.objectives.labelled_tokens import LabelledTokens
from meta_peft.objectives.masked_lm import MASKED_LM
from meta_peft.objectives.seq2seq_lm import SEQ2SEQ_LM

OBJECTIVES: dict[str, LabelledTokens] = {"causal_lm": CAUSAL_LM, "seq2seq_lm": SEQ2SEQ_LM, "masked_lm": MASKED_LM}


def objective_name(base: Any) -> str:
    """The name of the objective that a `transformers` model is made for."""
    masked = type(base).__name__.endswith("ForMaskedLM")
    return "seq2seq_lm" if base.config.is_encoder_decoder else "masked_lm" if masked else "causal_lm"


def objective_for(base: Any, name: str | None = None) -> LabelledTokens:
    """The objective called `name`, or the one that a `transformers` model is made for."""
    name = objective_name(base) if name is None else name
    if name not in OBJECTIVES:
        raise MetaPeftError(
            f"Unknown objective {name!r}: expected one of {sorted(OBJECTIVES)}, or None to choose by the model."
        )
    if name == "causal_lm" and _looks_ahead(base):
        raise MetaPeftError(
            f"{type(base).__name__} sees the tokens that it is to predict: its attention is not causal. Load it with"
            " is_decoder=True in its config, or with AutoModelForMaskedLM."
        )
    return OBJECTIVES[name]


def _looks_ahead(base: Any) -> bool:
    """Whether this is an encoder, like BERT's, under a head for next tokens."""
    encoder = getattr(base.config, "is_decoder", None) is False
    return encoder and any(getattr(module, "is_causal", True) is False for module in base.modules())
