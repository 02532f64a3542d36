"""The tokenizer of a base model, or for speech its processor."""

from __future__ import annotations

from typing import Any

from meta_peft.base.base_config import objective_of
from meta_peft.base.locate import locate
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.objectives import CLASSIFYING
from meta_peft.tasks.encoding import tokenizer_of


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    objective: str | None = None,
    speech_language: str | None = None,
) -> Any:
    """The tokenizer of `name`, with a padding token; for speech the processor, which has one and makes features of sound.

    Args:
        name: as in `from_pretrained`.
        revision: the same.
        trust_remote_code: the same.
        objective: what the model is for; by default to write text.
        speech_language: in which a speech model is to write.
    """
    from transformers import AutoProcessor, AutoTokenizer

    where, kind = locate(name, revision), AutoProcessor if objective == "speech_seq2seq" else AutoTokenizer
    try:
        processor = kind.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer_of(processor)
        if speech_language is not None:
            tokenizer.set_prefix_tokens(language=speech_language, task="transcribe")
    except (OSError, ValueError, AttributeError) as error:
        raise MetaPeftError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None and objective not in ("masked_lm", *CLASSIFYING):
        raise MetaPeftError(f"The tokenizer of {name} has no end-of-sequence token, so no completion could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def tokenizer_for(args: ModelArguments) -> Any:
    """The tokenizer of the base of `args`, or its processor for speech."""
    return load_tokenizer(
        args.model_name_or_path,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        objective=objective_of(args),
        speech_language=args.speech_language,
    )


def agree_on_padding(base: Any, objective: str, tokenizer: Any) -> None:
    """See to it that the config of `base` says what the tokenizer pads with.

    A decoder under a classification head reads the last token of a row that is none of these.
    """
    config = base.config.get_text_config()
    if objective != "sequence_classification" or config.pad_token_id == tokenizer.pad_token_id:
        return
    if config.pad_token_id is not None:
        raise MetaPeftError(
            f"The tokenizer pads with token {tokenizer.pad_token_id}, the config of {type(base).__name__} says"
            f" pad_token_id={config.pad_token_id}: set one of them to the other."
        )
    config.pad_token_id = tokenizer.pad_token_id
