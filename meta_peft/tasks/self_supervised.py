"""Tasks made of plain text, for those who have no labelled ones.

SMLMT (Bansal et al. 2020, "Self-Supervised Meta-Learning for Few-Shot Natural Language Classification Tasks"): N words
are the classes, and their examples are sentences in which that word is masked. Which word is it? Span completion: the
sentences of one document are one task, and what is written is a span that was taken out, or the end.

Both are tables like any other: SMLMT's task column is its label, the masked word, so that episodes, label words and
splits by class are those of labelled data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.sources.arrow_cache import cached, uncached
from meta_peft.tasks.text_columns import check_text
from meta_peft.tasks.written import written
from meta_peft.utils import digests

KINDS = ("smlmt", "span", "continuation")
WORD = re.compile(r"\b[^\W\d_]{3,}\b")  # words that can be classes: of three letters or more, and of nothing else
SENTENCE = re.compile(r"(?<=[.!?])\s+")
LEAST_WORDS = 6  # of a sentence that is used
LONGEST_SPAN = 4  # words
MOST_TEXTS = 100  # sentences of a word: more make the table larger and its episodes no better
MOST_COMMON = 0.05  # a word that more sentences than this share have says little about them
BEGINNING, DIGITS = 40, 16  # of a text and of its digest, in the name of the task that it is


def self_supervised(
    dataset: Dataset, kind: str, *, task_column: str, mask: str = "___", least_texts: int = 8, seed: int = 0
) -> Dataset:
    """Rows of tasks made of the column `text`.

    Args:
        kind: ``smlmt`` gives `text` and `label`; ``span`` and ``continuation`` give `prompt` and `completion`, and the task
            of a row is its text's, or if it has none the text itself, which the same text is in any other table.
        task_column: of span completion.
        mask: what stands for the words taken out.
        least_texts: sentences of a word, for it to be a class of SMLMT.
        seed: which span of a sentence is taken out.
    """
    if "text" not in dataset.column_names:
        raise MetaPeftError(
            f"self_supervised: {kind} makes tasks of a column 'text'; the columns are {dataset.column_names}. Rename yours"
            " with rename_columns."
        )
    check_text(dataset, ("text",), ("text",))

    def rows() -> Iterator[dict[str, Any]]:
        if kind == "smlmt":
            yield from masked_words(dataset, mask, least_texts)
        else:
            yield from completions(dataset, kind, task_column, mask, seed)

    if not dataset.cache_files:
        return uncached(rows())
    return cached("\0".join([dataset._fingerprint, kind, task_column, mask, str(least_texts), str(seed)]), rows)


def masked_words(dataset: Dataset, mask: str, least_texts: int) -> Iterator[dict[str, str]]:
    """SMLMT: for each word of enough sentences, those sentences with the word masked, and the word as their label."""
    texts_with: Counter[str] = Counter()
    n_texts = 0
    for text in _sentences(dataset):
        texts_with.update(_words(text))
        n_texts += 1
    most = max(MOST_COMMON * n_texts, least_texts)
    left = {word: MOST_TEXTS for word, n in texts_with.items() if least_texts <= n <= most}
    if len(left) < 2:
        raise MetaPeftError(
            f"Of {n_texts} sentences, {len(left)} words are in {least_texts} to {most:g} of them, and it takes two to make"
            " a task: give more text."
        )
    for text in _sentences(dataset):
        for word in sorted(_words(text)):
            if left.get(word, 0) > 0:
                left[word] -= 1
                yield {"text": _without(word, text, mask), "label": word}


def completions(dataset: Dataset, kind: str, task_column: str, mask: str, seed: int) -> Iterator[dict[str, str]]:
    """Sentences with a span masked, which is the completion; or their beginnings, and how they go on."""
    named, found = task_column in dataset.column_names, False
    for row in dataset:
        text = _text(row["text"])
        digest = digests.of_texts(text)
        task = written(row[task_column]) if named else f"{' '.join(text[:BEGINNING].split())} [{digest[:DIGITS]}]"
        for place, sentence in enumerate(SENTENCE.split(text)):
            words = sentence.split()
            if len(words) >= LEAST_WORDS:
                found = True
                # From what the text says, not where: rows of a text that is there twice repeat, and are left out.
                rng = np.random.default_rng([seed, int(digest, 16), place])
                yield {task_column: task, **_completion(words, kind, mask, rng)}
    if not found:
        raise MetaPeftError(
            f"None of the {len(dataset)} texts has a sentence of {LEAST_WORDS} words or more: give more text."
        )


def _completion(words: list[str], kind: str, mask: str, rng: np.random.Generator) -> dict[str, str]:
    if kind == "continuation":
        cut = int(rng.integers(len(words) // 2, len(words) - 1))
        return {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
    length = int(rng.integers(1, LONGEST_SPAN + 1))
    start = int(rng.integers(0, len(words) - length + 1))
    prompt = [*words[:start], mask, *words[start + length :], "->"]
    return {"prompt": " ".join(prompt), "completion": " " + " ".join(words[start : start + length])}


def _sentences(dataset: Dataset) -> Iterator[str]:
    for batch in dataset.select_columns(["text"]).iter(1000):
        for text in map(_text, batch["text"]):
            yield from (sentence for sentence in SENTENCE.split(text) if len(sentence.split()) >= LEAST_WORDS)


def _text(value: Any) -> str:
    return "" if value is None else written(value)


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


def _without(word: str, text: str, mask: str) -> str:
    """`text` with each of its words that `_words` takes for this one masked."""
    return WORD.sub(lambda found: mask if found[0].lower() == word else found[0], text)
