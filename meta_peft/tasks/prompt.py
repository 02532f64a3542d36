"""From a row of data to token ids and labels: what the model reads, and what it must write."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meta_peft.checked import shown
from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.multiple_choice import CHOICES, encode_with_choices

LONGEST_TEMPLATE = 10_000
INPUT_TARGET = [("input", "target"), ("text", "label"), ("question", "answer")]
NOT_TEXT = [("audio", "text"), ("tokens", "tags")]  # which only the models read that are made for them


def example_columns(columns: Collection[str]) -> tuple[str, ...]:
    """The columns that hold the example itself: the first known form that `columns` has."""
    for form in [("prompt", "completion"), *NOT_TEXT, *INPUT_TARGET, ("messages",)]:
        if set(form) <= set(columns):
            return form
    forms = "prompt + completion, " + ", ".join(" + ".join(pair) for pair in INPUT_TARGET + NOT_TEXT) + ", or messages"
    raise MetaPeftError(f"Expected columns {forms}; the columns are {sorted(columns)}. Rename yours to one of these.")


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes text; saved with the adapter, since an adapter only knows the format it was trained on.

    prompt/completion rows are taken as they are. input/target rows (or text/label, question/answer) go through the
    two templates. messages rows go through the tokenizer's chat template; the last assistant turn is the completion.
    The completion ends with the tokenizer's end-of-sequence token; only the completion is learned.
    """

    prompt_template: str = "{input} ->"
    completion_template: str = " {target}"

    def __post_init__(self) -> None:
        for name, field in (("prompt_template", "{input}"), ("completion_template", "{target}")):
            template = getattr(self, name)
            if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE or not _is_unicode(template):
                raise MetaPeftError(
                    f"{name} must be a text of at most {LONGEST_TEMPLATE} characters, got {shown(template)}."
                )
            if template.count(field) != 1:
                raise MetaPeftError(
                    f"{name} must contain {field}, got {shown(template)}: the place for the text, once."
                )

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def render(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and completion of a row that is not a conversation."""
        form = example_columns(row.keys())
        first, second = (_text(row, column) for column in form)
        if form == ("prompt", "completion"):
            return first, second
        prompt = self.prompt_template.replace("{input}", first)
        return prompt, self.completion_template.replace("{target}", second)

    def encode(self, row: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """Token ids ``[L]`` and labels ``[L]``, -100 on the prompt. A long prompt is cut at its start to fit.

        A row with a column `choices` has the tokens of its answers beside these (see `multiple_choice`).
        """
        if CHOICES in row:
            column = example_columns(row.keys())[-1]
            return encode_with_choices(row, column, lambda plain: self.encode(plain, tokenizer, max_length))
        if example_columns(row.keys()) == ("messages",):
            prompt, completion = _encode_messages(row["messages"], tokenizer)
        else:
            texts = self.render(row)
            prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            completion = [*completion, tokenizer.eos_token_id]
            # A fixed first token gives attention somewhere to rest; without one, the first word of the prompt does.
            prompt = [_first_token(tokenizer), *prompt]
        if len(completion) >= max_length:
            raise MetaPeftError(
                f"A completion of {len(completion)} tokens does not fit max_length={max_length}: raise max_length."
            )
        room = max_length - len(completion)
        prompt = prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]
        return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}

    def with_label(self, features: Mapping[str, Any], label: str, tokenizer: Any) -> dict[str, list[int]]:
        """Encoded rows with another target in the place of the completion."""
        text = self.completion_template.replace("{target}", label)
        completion = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        prompt = list(features["input_ids"])[: list(features["labels"]).count(IGNORED)]
        return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def _first_token(tokenizer: Any) -> int:
    token: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None or (isinstance(value, str) and not value):
        raise MetaPeftError(f"Column {column!r} is empty in the row {shown(dict(row))}.")
    if not isinstance(value, (str, int, float, bool)):
        raise MetaPeftError(f"Column {column!r} must hold text or numbers; got {shown(value)}.")
    if isinstance(value, str) and not _is_unicode(value):
        raise MetaPeftError(f"Column {column!r} holds half of a surrogate pair, which is no character: {shown(value)}.")
    return value if isinstance(value, str) else str(value)


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written: JSON may hold one half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _encode_messages(messages: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(isinstance(turn, Mapping) for turn in turns) or turns[-1].get("role") != "assistant":
        raise MetaPeftError(
            f"A conversation must end with an assistant turn, got {shown(messages)}: it is a list of turns."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise MetaPeftError("Rows are conversations, but the tokenizer has no chat template: use an instruct model.")
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    except Exception as error:  # a template is a program, and raises what it likes
        raise MetaPeftError(
            f"The tokenizer's chat template refuses the conversation {shown(messages)}: {shown(str(error))}."
        ) from error
    if whole[: len(prompt)] != prompt:
        raise MetaPeftError(
            "The tokenizer's chat template does not continue its own prompt: use prompt/completion rows."
        )
    return prompt, whole[len(prompt) :]
