"""Sentences of reviews in eight languages and the feeling in them: python recipes/data/reviews.py [FOLDER]

Other data for the recipe decoder_classification. A sentence is positive, negative, ambivalent or neutral. Training tasks
are of hotels and medicine, validation tasks of university courses, test tasks of products. One task is of one domain and
one language, and has sentences of its own. All languages but Polish are translated by machine, and read like it.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from bigbench import SOURCE, families
from family import Tasks, apart, run

ABOUT = """
MultiEmo: Kocoń, Miłkowski and Kanclerz, Multilingual, Multilevel, Multidomain Sentiment Analysis Corpus of Consumer
Reviews, ICCS 2021, as a task of BIG-bench.
"""
DOMAINS = {"train": ("hotels", "medicine"), "validation": ("reviews",), "test": ("products",)}
LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pl", "pt")
FEELINGS = ("positive", "negative", "ambivalent", "neutral")
SHORTEST, LONGEST = 15, 100
ROWS_PER_LABEL = 24
N_TASKS = {"train": 5, "validation": 1, "test": 3}  # of a domain and a language, or as many as there are


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(families() / "multiemo", options.seed)


def tasks_of(folder: Path, seed: int) -> dict[str, Tasks]:
    rng = np.random.default_rng(seed)
    splits: dict[str, Tasks] = {}
    for part, domains in DOMAINS.items():
        splits[part] = {}
        for domain in domains:
            for language in LANGUAGES:
                found = felt(folder / f"{domain}_sentence_{language}" / "task.json")
                tasks = apart(found, ROWS_PER_LABEL, N_TASKS[part], rng)
                splits[part] |= {f"{domain} {language} {number}": rows for number, rows in enumerate(tasks, 1)}
    return splits


def felt(file: Path) -> dict[str, list[str]]:
    """Sentences by feeling, each once; those that are there with two feelings are left out."""
    feeling_of: dict[str, str | None] = {}
    for example in json.loads(file.read_text(encoding="utf-8"))["examples"]:
        text = " ".join(example["input"].split())
        feeling = max(FEELINGS, key=example["target_scores"].get)
        if SHORTEST <= len(text) <= LONGEST:
            feeling_of[text] = feeling if feeling_of.get(text, feeling) == feeling else None
    return {feeling: [text for text, its in feeling_of.items() if its == feeling] for feeling in FEELINGS}


def main(words: list[str] | None = None) -> int:
    return run("reviews", str(__doc__), f"# Feelings in reviews\n{ABOUT}{SOURCE}", make, words=words)


if __name__ == "__main__":
    sys.exit(main())
