"""Short texts that people rated as positive or negative, from four domains: python recipes/data/sentiment.py [FOLDER]

Training tasks are tweets and film reviews, validation tasks newspaper editorials, test tasks product reviews. One task
is one domain and one pair of label words. Most pairs say nothing by themselves (A and B, red and blue), and stand there
in both orders: which is which is in the examples alone. "positive" and "negative" are a pair of the test tasks, for
comparison.

With --classes a task has texts of its own, 24 positive and 24 negative ones of a domain, for a classification head whose
classes have no names: other data for the recipe decoder_classification.
"""

from __future__ import annotations

import html
import io
import sys
import tarfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from family import Rows, Tasks, run, sample

from meta_peft.base.packages import pip_download

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SOURCE = f"""
# Texts and their sentiment

From the source archive of the Python package {PACKAGE}=={VERSION} (MIT), file `hutto_ICWSM_2014.tar.gz`, with the mean
rating of 20 people for each text. Whoever uses it is asked to cite: C.J. Hutto and Eric Gilbert, VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014. The texts are by users of Twitter,
rottentomatoes.com and amazon.com and by the New York Times.
"""
DOMAINS = {
    "train": {"tweets": "tweets", "films": "movieReviewSnippets"},
    "validation": {"editorials": "nytEditorialSnippets"},
    "test": {"products": "amazonReviewSnippets"},
}
# The word for positive first.
WORDS = {
    "train": "good/bad happy/sad yes/no A/B B/A 1/2 2/1 red/blue blue/red left/right right/left",
    "validation": "positive/negative tea/coffee coffee/tea",
    "test": "positive/negative X/Y Y/X north/south south/north",
}
CLEAR = 1.0  # ratings go from -4 to 4; texts between -1 and 1 are left out
SHORTEST, LONGEST = 15, 140
ROWS_PER_LABEL = 24
MOST_TASKS = 40  # of a domain, with --classes


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(pip_download(PACKAGE, VERSION, scratch, source=True), options.seed, options.classes)


def tasks_of(archive: Path, seed: int, classes: bool = False) -> dict[str, Tasks]:
    with tarfile.open(archive) as package:
        inner = package.extractfile(f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        texts = io.BytesIO(inner.read())
    splits: dict[str, Tasks] = {}
    rng = np.random.default_rng(seed)
    with tarfile.open(fileobj=texts) as files:
        for part, domains in DOMAINS.items():
            splits[part] = {}
            for domain, name in domains.items():
                file = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                assert file is not None
                clear = rated(file.read().decode("utf-8", errors="replace"))
                if classes:
                    splits[part] |= apart(domain, clear, rng)
                    continue
                for number, words in enumerate(WORDS[part].split()):
                    splits[part][f"{domain} {words}"] = labelled(clear, words.split("/"), seed + number)
    return splits


def rated(file: str) -> dict[bool, list[str]]:
    """Texts that are clearly negative and clearly positive; a line has a number, a rating and a text."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for line in file.splitlines():
        _, rating, text = line.split("\t", 2)
        text = " ".join(html.unescape(text).split())
        if abs(float(rating)) >= CLEAR and SHORTEST <= len(text) <= LONGEST and "\ufffd" not in text:
            found[float(rating) > 0].append(text)
    return found


def labelled(texts: dict[bool, list[str]], words: list[str], seed: int) -> Rows:
    positive = [{"text": text, "label": words[0]} for text in texts[True]]
    negative = [{"text": text, "label": words[1]} for text in texts[False]]
    return sample(positive, ROWS_PER_LABEL, seed) + sample(negative, ROWS_PER_LABEL, seed)


def apart(domain: str, texts: dict[bool, list[str]], rng: np.random.Generator) -> Tasks:
    """Tasks of different texts, as many of each label."""
    distinct = {label: list(dict.fromkeys(found)) for label, found in texts.items()}
    n = min(len(found) for found in distinct.values()) // ROWS_PER_LABEL
    order = {label: rng.permutation(len(found)) for label, found in distinct.items()}
    words = {True: "positive", False: "negative"}
    return {
        f"{domain} {task + 1}": [
            {"text": distinct[label][i], "label": word}
            for label, word in words.items()
            for i in order[label][ROWS_PER_LABEL * task : ROWS_PER_LABEL * (task + 1)]
        ]
        for task in range(min(n, MOST_TASKS))
    }


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--classes", action="store_true", help="different texts for each task, and no label words")


def main(words: list[str] | None = None) -> int:
    return run("sentiment", str(__doc__), SOURCE, make, options, words=words)


if __name__ == "__main__":
    sys.exit(main())
