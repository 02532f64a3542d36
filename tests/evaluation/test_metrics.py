"""Against values computed by hand, and against what the libraries' own documentation prints."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from surface import run_python

from meta_peft import MetaPeftError
from meta_peft.config import MetaLoraConfig
from meta_peft.evaluation.metrics import METRICS, default_metric, metric_named

RIGHT = ["the cat", "a dog", "two birds"]


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.of == "texts"])
def test_a_perfect_and_a_hopeless_task(name: str):
    metric = METRICS[name]
    best, worst = metric(RIGHT, RIGHT), metric(["xyz"] * 3, RIGHT)
    if metric.higher_is_better:
        whole = 1 if metric.unit else 100
        assert best == pytest.approx(whole) or name == "bleu"  # there are no four words to count in texts of two
        assert worst == 0
    else:
        assert best == 0
        assert worst > 0.8


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("exact_match", ["a b", "a  b\n", "A b", "ab"], ["a b"] * 4, 1 / 2),
        ("accuracy", ["x", "y", "y"], ["x", "x", "y"], 2 / 3),
        ("accuracy", [0, 1, 2, 3], [0, 1, 2, 0], 3 / 4),
        # class 0: F1 1; class 1: precision 1/2, recall 1; class 2: precision 1, recall 1/2
        ("macro_f1", [0, 1, 1, 2], [0, 1, 2, 2], (1 + 2 / 3 + 2 / 3) / 3),
        ("macro_f1", ["x", "x"], ["x", "x"], 1),
        ("macro_f1", ["x", "x"], ["x", "y"], (2 / 3 + 0) / 2),  # never predicted: F1 0
        # precision 2/3, recall 2/4; and nothing in common
        ("token_f1", ["the big cat", "x"], ["the cat sat down", "y"], (4 / 7 + 0) / 2),
        ("token_f1", ["The cat"], ["the cat"], 1 / 2),  # the case counts
        ("token_f1", ["a a b"], ["a b b"], 2 / 3),
        ("token_f1", ["", ""], ["", "x"], 1 / 2),
        ("squad_exact_match", ["The cat!", "a dog."], ["cat", "cat"], 1 / 2),
        ("squad_f1", ["The big cat"], ["a cat sat"], 1 / 2),  # big cat, cat sat
        ("wer", ["a x c", "a"], ["a b c", "a b"], 2 / 5),  # summed before dividing
        ("wer", ["a b c d"], ["a"], 3),  # more than all can be wrong
        ("cer", ["abc", "a"], ["abd", "ab"], 2 / 5),
        ("ece", [0.9, 0.9, 0.6], [True, False, True], (2 * 0.4 + 0.4) / 3),
        ("ece", [1.0, 1.0], [True, True], 0),
        ("ece", [1.0000001, 0.75], [True, True], 1 / 8),
        ("ece", [float("nan"), 1.0], [False, True], 0),
    ],
)
def test_by_hand(name: str, predictions: list, references: list, expected: float):
    assert METRICS[name](predictions, references) == pytest.approx(expected, abs=1e-6)


def test_chrf_by_hand():
    """abc for abd: 2 of 3 characters, 1 of 2 pairs, 0 of 1 triples; no longer n-grams can be had, so none are missed."""
    assert METRICS["chrf"](["abc"], ["abd"]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert METRICS["chrf"](["ab"], ["ab"]) == 100


def test_chrf_of_sacrebleus_documentation():
    """The example of its README has two references, of which it takes the better one for each sentence: chrF2 = 59.73."""
    system = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    first = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    second = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    chrf = METRICS["chrf"]
    better = [max(two, key=lambda r: chrf([s], [r])) for s, *two in zip(system, first, second, strict=True)]
    assert chrf(system, better) == pytest.approx(59.73, abs=0.005)


def test_bleu_by_hand():
    """3 of 4 words, 2 of 3 pairs, 1 of 2 triples, and half of one for none of 1 quadruple; 3 words, of 4, are short."""
    bleu = METRICS["bleu"]
    assert bleu(["a b c d"], ["a b c e"]) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    assert bleu(["a b c d"], ["a b c d e"]) == pytest.approx(100 * np.exp(1 - 5 / 4))


def test_white_space_does_not_count():
    for name in ("exact_match", "chrf", "bleu", "wer", "cer", "token_f1"):
        messy, clean = (
            METRICS[name]([" a\tcat  sat \n"], ["a cat sat down"]),
            METRICS[name](["a cat sat"], ["a cat sat down"]),
        )
        assert messy == clean, name


def test_the_worst_task_and_how_a_value_is_shown():
    values = np.array([0.2, 0.8])
    assert (METRICS["chrf"].worst(values), METRICS["wer"].worst(values)) == (0.2, 0.8)
    assert [METRICS[name].shown(0.254) for name in ("exact_match", "wer", "ece")] == ["25"] * 3
    assert METRICS["chrf"].shown(55.4) == "55"
    assert METRICS["accuracy"].shown(-0.004) == "0"
    assert (METRICS["wer"].head, METRICS["bleu"].head) == ("WER, %", "BLEU")


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_nothing_to_compare(predictions: list[str], references: list[str]):
    with pytest.raises(MetaPeftError, match=r"wer compares predictions with references, one each .* got \d and \d"):
        METRICS["wer"](predictions, references)


def test_names():
    assert metric_named("wer").name == "wer"
    with pytest.raises(
        MetaPeftError, match=r"metric must be one of exact_match, .*; got 'chrff'. Did you mean 'chrf'\?"
    ):
        metric_named("chrff")
    assert {default_metric(name) for name in ("causal_lm", "seq2seq_lm", "masked_lm")} == {"exact_match"}
    assert default_metric("speech_seq2seq") == "wer"
    assert default_metric("token_classification") == default_metric("sequence_classification") == "accuracy"


def test_every_name_is_in_the_help_of_the_option():
    text = MetaLoraConfig.__dataclass_fields__["metric"].metadata["help"]
    assert all(name in text for name in METRICS)


@pytest.mark.parametrize(
    ("name", "package"), [("chrf", "sacrebleu"), ("wer", "torchmetrics"), ("macro_f1", "torchmetrics")]
)
def test_without_the_library(name: str, package: str, monkeypatch: pytest.MonkeyPatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"The metric {name} needs {package}: pip install 'meta-peft\[metrics\]'"
    with pytest.raises(MetaPeftError, match=message):
        metric_named(name)
    assert metric_named("exact_match")(["a"], ["a"]) == 1


def test_no_library_is_imported_before_it_is_used():
    run_python(
        "import sys\nimport meta_peft.evaluation.metrics\n"
        "assert not {'torchmetrics', 'sacrebleu'} & set(sys.modules), sys.modules"
    )
