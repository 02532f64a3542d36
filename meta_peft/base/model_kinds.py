"""How the model of each objective is loaded, and what PEFT calls its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meta_peft.objectives import made_for


@dataclass(frozen=True)
class ModelKind:
    """The class of `transformers` that loads a model, PEFT's task type, and the hub's name for what it does.

    With a task type of None, PEFT's wrapper hands on whatever inputs it gets, sound for one.
    """

    auto: str
    task_type: str | None
    pipeline: str


KINDS = {
    "causal_lm": ModelKind("AutoModelForCausalLM", "CAUSAL_LM", "text-generation"),
    "seq2seq_lm": ModelKind("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "text-generation"),
    "speech_seq2seq": ModelKind("AutoModelForSpeechSeq2Seq", None, "automatic-speech-recognition"),
    "masked_lm": ModelKind("AutoModelForMaskedLM", None, "fill-mask"),
    "sequence_classification": ModelKind("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification"),
    "token_classification": ModelKind("AutoModelForTokenClassification", "TOKEN_CLS", "token-classification"),
}


def objective_of_config(config: Any) -> str:
    """The objective that the model of a config is made for."""
    return made_for(config, (getattr(config, "architectures", None) or [""])[0])


def auto_class(objective: str) -> Any:
    """What loads a model with the head that `objective` needs."""
    import transformers

    return getattr(transformers, KINDS[objective].auto)
