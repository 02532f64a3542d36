from __future__ import annotations

from surface import tiny_tokenizer
from transformers import WhisperFeatureExtractor

from meta_peft.tasks import PromptFormat
from meta_peft.tasks.encoding import Encoding
from meta_peft.tasks.fingerprint import fingerprint


class Processor:
    def __init__(self, tokenizer, feature_extractor):
        self.tokenizer, self.feature_extractor = tokenizer, feature_extractor


def encoding(max_length: int = 32, prompt_format: PromptFormat | None = None, **special) -> Encoding:
    tokenizer = tiny_tokenizer()
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return Encoding("causal_lm", prompt_format or PromptFormat(), tokenizer, max_length)


def test_what_encodes_alike_has_one_name():
    """Another object of the same parts, and one that was used, which changes what it pickles to."""
    used = encoding()
    used({"input": "a", "target": "b"})
    used.tokenizer(["a", "abc"], padding=True)
    assert fingerprint(encoding()) == fingerprint(encoding()) == fingerprint(used)


def test_what_encodes_otherwise_has_another():
    extractors = [WhisperFeatureExtractor(feature_size=size) for size in (80, 128)]
    values = [
        encoding(),
        encoding(31),
        encoding(prompt_format=PromptFormat("{input}")),
        encoding(eos_token="<s>"),
        encoding(chat_template="x"),
        *(Encoding("causal_lm", PromptFormat(), Processor(tiny_tokenizer(), e), 32) for e in extractors),
    ]
    assert len({fingerprint(value) for value in values}) == len(values)
    plain = ["ab", ["a", "b"], ["ab"], [], {}, {"a": "b"}, {"a": ["b"]}, None, 1, "1", True]
    assert len({fingerprint(value) for value in plain}) == len(plain) - 1  # an empty list is like an empty mapping
    assert fingerprint("a", "b") != fingerprint("ab")


def test_what_is_not_known_has_none():
    assert fingerprint(Encoding("causal_lm", PromptFormat(), object(), 32)) is None


def test_a_tokenizer_is_read_once_however_many_encodings_have_it(monkeypatch):
    """Where tasks number their classes themselves, each has an encoding of its own."""
    from dataclasses import replace

    from meta_peft.tasks import fingerprint as module

    encoding = Encoding("causal_lm", PromptFormat(), tiny_tokenizer(), 16)
    read = []
    real = module._of_processor
    monkeypatch.setattr(module, "_of_processor", lambda value, known: (read.append(value), real(value, known))[1])
    many = {str(i): replace(encoding, max_length=16 + i) for i in range(20)}
    assert fingerprint(many) == fingerprint(dict(many))
    assert len(read) == 2
    assert fingerprint(many) != fingerprint({**many, "3": encoding})
