"""From a row of data to token ids and labels: what the model reads, and what it must write."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meta_peft.errors import MetaPeftError
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.tasks.multiple_choice import CHOICES
from meta_peft.tasks.plain import plain
from meta_peft.tasks.turns import empty_turn
from meta_peft.tasks.written import written
from meta_peft.utils.checked import one_of, shown

LONGEST_TEMPLATE = 10_000
INPUT_TARGET = [("input", "target"), ("text", "label"), ("question", "answer")]
ANSWERS = ("question", "answers")
SOUND = [("audio", "sentence"), ("audio", "text"), ("audio", "transcription")]
TAGGED = [("tokens", "tags"), ("tokens", "ner_tags")]
NOT_TEXT = [*SOUND, *TAGGED]  # which only the models read that are made for them
FORMS = [("prompt", "completion"), *NOT_TEXT, *INPUT_TARGET, ANSWERS, ("messages",)]
NO_ANSWER = "unanswerable"  # what SQuAD 2.0's questions without an answer are answered with
ASSISTANT_TURNS = ("last", "all")

Features = dict[str, Any]


def example_columns(columns: Collection[str]) -> tuple[str, ...]:
    """The columns that hold the example itself: the first known form that `columns` has."""
    for form in FORMS:
        if set(form) <= set(columns):
            return form
    forms = ", ".join(" + ".join(form) for form in FORMS)
    raise MetaPeftError(
        f"Expected columns {forms}; the columns are {sorted(columns)}. Rename yours to one of these: in training with"
        " rename_columns, whose adapter is then adapted and evaluated on rows with the old names too."
    )


def read_columns(columns: Collection[str]) -> tuple[str, ...]:
    """All columns that are read: those of the form, the context of a question and answers to choose from if there are."""
    form = example_columns(columns)
    more = ["context"] if form[0] == "question" else []
    return (*form, *(column for column in [*more, CHOICES] if column in columns))


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes text; saved with the adapter, since an adapter only knows the format it was trained on.

    prompt/completion rows are taken as they are. input/target rows (or text/label, question/answer) go through the
    two templates; a question's context is put in front of it by `context_template`. messages rows go through the
    tokenizer's chat template; learned is the last assistant turn, or with ``assistant_turns="all"`` every one. The
    completion ends with the tokenizer's end-of-sequence token; only the completion is learned.
    """

    prompt_template: str = "{input} ->"
    completion_template: str = " {target}"
    context_template: str = "{context}\n{question}"
    assistant_turns: str = "last"

    def __post_init__(self) -> None:
        fields = {
            "prompt_template": ("{input}",),
            "completion_template": ("{target}",),
            "context_template": ("{context}", "{question}"),
        }
        for name, places in fields.items():
            template = getattr(self, name)
            if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE or not _is_unicode(template):
                raise MetaPeftError(
                    f"{name} must be a text of at most {LONGEST_TEMPLATE} characters, got {shown(template)}."
                )
            for place in places:
                if template.count(place) != 1:
                    raise MetaPeftError(
                        f"{name} must contain {place}, got {shown(template)}: the place for the text, once."
                    )
        one_of("assistant_turns", self.assistant_turns, ASSISTANT_TURNS)

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def render(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and completion of a row that is text."""
        form = example_columns(row.keys())
        if form in NOT_TEXT or form == ("messages",):
            raise MetaPeftError(
                f"Rows of {' + '.join(form)} are no prompt and completion: choose the objective that is made for them."
            )
        first = _text(row, form[0])
        second = _first_answer(row["answers"], row) if form == ANSWERS else _text(row, form[1])
        if form == ("prompt", "completion"):
            return first, second
        if form[0] == "question" and row.get("context") not in (None, ""):
            values = {"{question}": first, "{context}": _text(row, "context")}
            first = re.sub(r"\{(?:question|context)\}", lambda place: values[place[0]], self.context_template)
        return self.prompt_template.replace("{input}", first), self._completion(second)

    def encode(self, row: Mapping[str, Any], tokenizer: Any, max_length: int) -> Features:
        """Token ids ``[L]`` and labels ``[L]``, -100 on the prompt. A long row is cut at its start to fit."""
        if example_columns(row.keys()) == ("messages",):
            ids, labels = _encode_messages(row["messages"], tokenizer, every=self.assistant_turns == "all")
        else:
            prompt, completion = self.render(row)
            # A fixed first token gives attention somewhere to rest; without one, the first word of the prompt does.
            read = [_first_token(tokenizer), *_tokens(prompt, tokenizer)]
            written = [*_tokens(completion, tokenizer), tokenizer.eos_token_id]
            ids, labels = read + written, [IGNORED] * len(read) + written
        return _cut_to_fit(ids, labels, max_length)

    def with_label(self, features: Mapping[str, Any], label: str, tokenizer: Any, max_length: int) -> Features:
        """The row that `encode` made `features` of, with another target; it must have gone through the templates."""
        prompt = features["input_ids"][: len(features["labels"]) - answer_length(features["labels"])]
        written = [*_tokens(self._completion(label), tokenizer), tokenizer.eos_token_id]
        ids, labels = prompt + written, [IGNORED] * len(prompt) + written
        return {**features, **_cut_to_fit(ids, labels, max_length)}

    def _completion(self, target: str) -> str:
        return self.completion_template.replace("{target}", target)


def answer_length(labels: Sequence[int]) -> int:
    """How many labelled tokens a row ends with: its answer. Earlier turns may be labelled too."""
    return next((n for n, label in enumerate(reversed(labels)) if label == IGNORED), len(labels))


def _cut_to_fit(ids: list[int], labels: list[int], max_length: int) -> Features:
    """The first token, and as much of the end as fits; the answer has to fit."""
    answer = answer_length(labels)
    if answer >= max_length:
        raise MetaPeftError(f"A completion of {answer} tokens does not fit max_length={max_length}: raise max_length.")
    if len(ids) > max_length:
        start = len(ids) - max_length + 1
        ids, labels = [ids[0], *ids[start:]], [IGNORED, *labels[start:]]
    return {"input_ids": ids, "labels": labels}


def _tokens(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _first_token(tokenizer: Any) -> int:
    token: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def _text(row: Mapping[str, Any], column: str) -> str:
    value = plain(row[column])
    if value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value)):
        raise MetaPeftError(f"Column {column!r} is empty in the row {shown(dict(row))}.")
    if not isinstance(value, (str, int, float, bool)):
        raise MetaPeftError(f"Column {column!r} must hold text or numbers; got {shown(value)}.")
    if isinstance(value, str) and not _is_unicode(value):
        raise MetaPeftError(f"Column {column!r} holds half of a surrogate pair, which is no character: {shown(value)}.")
    return written(value)


def _first_answer(answers: Any, row: Mapping[str, Any]) -> str:
    """The first of several accepted answers: of a list, or of SQuAD's ``{"text": [...], "answer_start": [...]}``."""
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, (list, tuple)):
        raise MetaPeftError(
            f"Column 'answers' must hold a list of texts, or SQuAD's {{'text': [...]}}; got {shown(answers)}."
        )
    return _text({**row, "answers": texts[0]}, "answers") if texts else NO_ANSWER


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written: JSON may hold one half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def _encode_messages(messages: Any, tokenizer: Any, *, every: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation: on its last turn, or on `every` turn of the assistant."""
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(isinstance(turn, Mapping) for turn in turns) or turns[-1].get("role") != "assistant":
        raise MetaPeftError(
            f"A conversation must end with an assistant turn, got {shown(messages)}: it is a list of turns."
        )
    if (empty := empty_turn(turns)) is not None:
        raise MetaPeftError(
            f"The turn {shown(empty)} has no content, in the conversation {shown(messages)}: fill it, or leave the row out."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise MetaPeftError("Rows are conversations, but the tokenizer has no chat template: use an instruct model.")
    learned = [i for i, turn in enumerate(turns) if turn.get("role") == "assistant"] if every else [len(turns) - 1]
    try:
        ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        spans = [_span_of_turn(turns[: i + 1], tokenizer) for i in learned]
    except Exception as error:  # a template is a program, and raises what it likes
        raise MetaPeftError(
            f"The tokenizer's chat template refuses the conversation {shown(messages)}: {shown(str(error))}."
        ) from error
    labels = [IGNORED] * len(ids)
    for prompt, whole in spans:
        if ids[: len(whole)] != whole or whole[: len(prompt)] != prompt:
            raise MetaPeftError(
                "The tokenizer's chat template does not continue its own prompt: use prompt/completion rows"
                + (", or assistant_turns: last." if every else ".")
            )
        labels[len(prompt) : len(whole)] = ids[len(prompt) : len(whole)]
    return ids, labels


def _span_of_turn(turns: list[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A conversation up to its last turn, which is to be written; and with it."""
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return prompt, whole
