"""What an encoding has to know of a model besides its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meta_peft.errors import MetaPeftError
from meta_peft.objectives import CLASSIFYING
from meta_peft.tasks.encoding.special_tokens import special_tokens
from meta_peft.utils.checked import one_of, shown, text, whole

MOST_CLASSES, LONGEST_NAME, LONGEST_PREFIX = 10_000, 1000, 64
NAMES, NUMBERS, IDS, UNKNOWN = LABELS = ("names", "numbers", "ids", "unknown")


@dataclass(frozen=True)
class Facts:
    """Saved with the adapter, since its labels mean nothing under other ones.

    Args:
        decoder_prefix: tokens that a decoder is given before the first one it has to predict, its start token first;
            for Whisper also those of language and task.
        num_labels: classes of the head.
        label_names: names of the classes, by number, where all tasks share them.
        labels: what labels were in training. ``names``, where a number is the number of a class. ``numbers`` of classes
            which the head has learned, and no names. ``ids``, numbers that mean nothing to the head, since episodes number
            their classes anew, or its start is not learned. ``unknown`` in a file from before this was written down.
    """

    decoder_prefix: tuple[int, ...] = ()
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    labels: str = NAMES

    def __post_init__(self) -> None:
        if len(self.decoder_prefix) > LONGEST_PREFIX:
            raise MetaPeftError(f"decoder_prefix must be a few tokens; got {shown(self.decoder_prefix)}.")
        for token in self.decoder_prefix:
            whole("decoder_prefix", token, 0, 2**31)
        whole("num_labels", self.num_labels, 0, MOST_CLASSES)
        one_of("labels", self.labels, LABELS)
        for name in self.label_names:
            text("label_names", name, LONGEST_NAME)
        if len(set(self.label_names)) < len(self.label_names) or len(self.label_names) > self.num_labels:
            raise MetaPeftError(
                f"There are {len(self.label_names)} names of classes, {len(set(self.label_names))} of them different, and"
                f" the head has {self.num_labels} classes: set num_labels to the most classes that a task has."
            )


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer, of a processor for speech too."""
    from transformers import ProcessorMixin

    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def facts_of(base: Any, objective: str, processor: Any) -> Facts:
    """What the model `base` and its tokenizer say."""
    if objective in CLASSIFYING:
        return Facts(num_labels=int(base.config.num_labels))
    if not base.config.is_encoder_decoder:
        return Facts()
    start = getattr(base.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(getattr(base, "generation_config", None), "decoder_start_token_id", None)
    if start is None:
        raise MetaPeftError(
            f"The config of {type(base).__name__} has no decoder_start_token_id, the token that its decoder starts with:"
            " set model.config.decoder_start_token_id."
        )
    before, _ = special_tokens(tokenizer_of(processor), of="text_target")
    return Facts(decoder_prefix=(start, *(before[1:] if before[:1] == [start] else before)))
