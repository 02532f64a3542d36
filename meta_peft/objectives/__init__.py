"""From a model's output to one loss and one score per task."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.objectives.causal_lm import CAUSAL_LM
from meta_peft.objectives.labelled_tokens import LabelledTokens
from meta_peft.objectives.masked_lm import MASKED_LM
from meta_peft.objectives.seq2seq_lm import SEQ2SEQ_LM
from meta_peft.objectives.sequence_classification import SEQUENCE_CLASSIFICATION
from meta_peft.objectives.token_classification import TOKEN_CLASSIFICATION

OBJECTIVES: dict[str, LabelledTokens] = {
    "causal_lm": CAUSAL_LM,
    "seq2seq_lm": SEQ2SEQ_LM,
    "speech_seq2seq": SEQ2SEQ_LM,  # the same loss; what differs is what a row is made of
    "masked_lm": MASKED_LM,
    "sequence_classification": SEQUENCE_CLASSIFICATION,
    "token_classification": TOKEN_CLASSIFICATION,
}
READS_BOTH_WAYS = ("cpmant",)  # models for next tokens whose configs do not tell
CLASSIFYING = ("sequence_classification", "token_classification")
_ENDINGS = {
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
}


def made_for(config: Any, architecture: str) -> str:
    """The name of the objective that an architecture, such as ``BertForMaskedLM``, with this config is made for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    for ending, name in _ENDINGS.items():
        if architecture.endswith(ending):
            return name
    if not config.is_encoder_decoder:
        return "causal_lm"
    return "speech_seq2seq" if config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES else "seq2seq_lm"


def objective_name(base: Any) -> str:
    """The name of the objective that a `transformers` model is made for."""
    return made_for(base.config, type(base).__name__.removeprefix("FSDP"))


def check_objective(name: str) -> None:
    """Raise `MetaPeftError` unless `name` is that of an objective."""
    if name not in OBJECTIVES:
        raise MetaPeftError(
            f"Unknown objective {name!r}: expected one of {sorted(OBJECTIVES)}, or None to choose by the model."
            f"{did_you_mean(name, OBJECTIVES)}"
        )


def objective_for(base: Any, name: str | None = None) -> LabelledTokens:
    """The objective called `name`, or the one that a `transformers` model is made for."""
    name = objective_name(base) if name is None else name
    check_objective(name)
    if name == "causal_lm" and base.config.model_type in READS_BOTH_WAYS:
        raise MetaPeftError(
            f"The context of {type(base).__name__} attends in both directions, so it sees the tokens that it is to predict."
            " Take a base of another type."
        )
    if name == "causal_lm" and _looks_ahead(base):
        raise MetaPeftError(
            f"{type(base).__name__} sees the tokens that it is to predict: its attention is not causal. Load it with"
            " is_decoder=True in its config, or with AutoModelForMaskedLM."
        )
    return OBJECTIVES[name]


def head_of(base: Any) -> nn.Module | None:
    """The layer that makes logits of hidden states; None for a classifier, whose own head is called something else."""
    head: nn.Module | None = base.get_output_embeddings()
    if isinstance(getattr(head, "base_layer", head), nn.Embedding):
        raise MetaPeftError(
            f"{type(base).__name__} names the embedding of its inputs as its output head, so the layer that makes its"
            " logits is not known: take a base of another type."
        )
    return head


def known_labels(base: Any, objective: str) -> int | None:
    """How many tokens or classes a model tells apart; None if it does not say."""
    if objective in CLASSIFYING:
        return int(base.config.num_labels)
    return getattr(base.get_output_embeddings(), "out_features", None)


def _looks_ahead(base: Any) -> bool:
    """Whether this is an encoder, like BERT's, under a head for next tokens, or a decoder that was made one."""
    config = base.config
    if getattr(config, "use_bidirectional_attention", False):
        return True
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return False
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return True
    encoder = getattr(config, "is_decoder", None) is False
    return encoder and any(getattr(module, "is_causal", True) is False for module in base.modules())
