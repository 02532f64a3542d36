"""Facts as sentences to complete, one relation per task: python recipes/data/question_answering.py [FOLDER]

"The capital of Canada is" asks for "Ottawa". Test relations, such as the genre of a work or the instrument of a
musician, are not near any training relation. No answer is more than a fifth of a task's rows, so that it takes more
than the usual answer.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from bigbench import SOURCE, examples, families
from family import Rows, Tasks, run

RELATIONS = {
    "train": {
        "capital": r"The capital of .+ is",
        "capital of": r".+ is capital of",
        "country": r"The country of .+ is",
        "located in": r".+ is located in",
        "original country": r"The original country of .+ is",
        "headquarters": r"The headquarters location of .+ is",
        "basin country": r"The basin country of .+ is",
        "border": r".+ shares a border with",
        "historic county": r"The historic county of .+ is",
        "indigenous": r".+ is indigenous to",
        "continent": r"The continent of .+ is",
        "language": r"The language of .+ is",
        "official language": r"The official language of .+ is",
        "language used": r"The language used in .+ is",
        "main subject": r"The main subject of .+ is",
        "facet": r".+ is facet of",
        "health specialty": r"The health specialty of .+ is",
        "quantity": r"The measured physical quantity of .+ is",
        "government": r"The basic form of government of .+ is",
        "follows": r".+ follows",
    },
    "validation": {
        "sport": r"The sport played by .+ is",
        "team position": r"The team position of .+ is",
        "color": r"The color of .+ is",
        "material": r"The material used in .+ is",
        "developer": r"The developer of .+ is",
    },
    "test": {
        "genre": r"The genre of .+ is",
        "record label": r"The record label of .+ is",
        "instrument": r"The instrument of .+ is",
        "voice type": r"The voice type of .+ is",
        "noble title": r"The noble title of .+ is",
        "military rank": r"The military rank of .+ is",
        "emergency number": r"The emergency phone number of .+ is",
    },
}
ROWS, FEWEST_ROWS = 100, 20
LARGEST_SHARE = 0.2


def make(options: Namespace, scratch: Path) -> dict[str, Tasks]:
    return tasks_of(examples(families() / "qa_wikidata" / "task.json"), options.seed)


def tasks_of(pairs: Iterable[tuple[str, str]], seed: int) -> dict[str, Tasks]:
    """Tasks by split; relations with too few rows are left out."""
    answers = dict(pairs)
    splits: dict[str, Tasks] = {}
    for part, relations in RELATIONS.items():
        found = {
            name: varied([q for q in answers if re.fullmatch(pattern, q)], answers, seed)
            for name, pattern in relations.items()
        }
        splits[part] = {name: rows for name, rows in found.items() if len(rows) >= FEWEST_ROWS}
    return splits


def varied(questions: list[str], answers: dict[str, str], seed: int) -> Rows:
    """Rows in random order, without those that would give an answer more than its share of them."""
    rng = np.random.default_rng(seed)
    order = [questions[i] for i in rng.permutation(len(questions))]
    for n in range(min(ROWS, len(order)), 0, -1):
        most = int(LARGEST_SHARE * n)
        taken: Counter[str] = Counter()
        rows = []
        for question in order:
            if len(rows) < n and taken[answers[question]] < most:
                taken[answers[question]] += 1
                rows.append({"question": question, "answer": answers[question]})
        if len(rows) == n:
            return rows
    return []


def main(words: list[str] | None = None) -> int:
    return run("question_answering", str(__doc__), f"# Facts of Wikidata\n{SOURCE}", make, words=words)


if __name__ == "__main__":
    sys.exit(main())
