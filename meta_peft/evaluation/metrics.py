"""The field's metrics by name: from the predictions and the references of one task to one number.

Texts are compared in the case and with the punctuation they have, but without white space around them and with every
run of white space as one space. ``squad_exact_match`` and ``squad_f1`` alone ignore case, punctuation and the English
articles, as the SQuAD evaluation does. Shares, and the error rates WER and CER, are fractions: 0.25 is shown as 25 %.
chrF and BLEU are numbers from 0 to 100, as papers print them.

Error rates, chrF and BLEU are those of all rows of a task together: edits and n-grams are summed before anything is
divided. All others are means over rows or classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from meta_peft.errors import MetaPeftError, did_you_mean

TEXTS, CLASSES, CONFIDENCES = "texts", "classes", "confidences"
BINS = 15  # of the expected calibration error


@dataclass(frozen=True)
class Metric:
    """How the predictions of a task are judged against its references.

    Args:
        title: what a column is headed with.
        compute: from predictions and references, equally many, to a number.
        of: what predictions are: `TEXTS`; `CLASSES`, one of a few labels each, texts or numbers; or `CONFIDENCES`, the
            probability of the predicted class, against whether it was right.
        unit: ``%`` if values are fractions, nothing if they are shown as they are.
        library: what `compute` imports, of the extra ``metrics``.
    """

    name: str
    title: str
    compute: Callable[[Sequence[Any], Sequence[Any]], float]
    of: str = TEXTS
    higher_is_better: bool = True
    unit: str = "%"
    library: str | None = None

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """The score of one task.

        Raises:
            MetaPeftError: there are none, or not equally many; or the library is not installed.
        """
        if len(predictions) != len(references) or not references:
            raise MetaPeftError(
                f"{self.name} compares predictions with references, one each and one at least; got {len(predictions)} and"
                f" {len(references)}."
            )
        if self.of == TEXTS:
            predictions, references = ([" ".join(text.split()) for text in t] for t in (predictions, references))
        return float(self.compute(predictions, references))

    @property
    def head(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def shown(self, value: float) -> str:
        """`value` in the metric's unit, rounded to whole numbers."""
        return f"{round(value * (100 if self.unit else 1), 0) + 0.0:.0f}"  # 0.0 makes 0 of -0

    def worst(self, values: np.ndarray) -> float:
        """The score of the task that fares worst; `values` is ``[T]``."""
        return float(values.min() if self.higher_is_better else values.max())

    def check_installed(self) -> None:
        """Raise unless the library that computes it is there."""
        if self.library is not None:
            _imported(self.library, self.name)


def metric_named(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        MetaPeftError: there is none, or what computes it is not installed.
    """
    if name not in METRICS:
        raise MetaPeftError(f"metric must be one of {', '.join(METRICS)}; got {name!r}.{did_you_mean(name, METRICS)}")
    METRICS[name].check_installed()
    return METRICS[name]


def default_metric(objective: str) -> str:
    """The name of the metric that speaks for tasks of this objective, if none is asked for."""
    by_objective = {
        "speech_seq2seq": "wer",
        "sequence_classification": "accuracy",
        "token_classification": "accuracy",
    }
    return by_objective.get(objective, "exact_match")


def _imported(library: str, metric: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        package = library.partition(".")[0]
        raise MetaPeftError(f"The metric {metric} needs {package}: pip install 'meta-peft[metrics]'.") from error


def _share_equal(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    return float(np.mean([p == r for p, r in zip(predictions, references, strict=True)]))


def _macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """The mean of F1 over the classes that were predicted or right anywhere."""
    number = {label: i for i, label in enumerate(dict.fromkeys((*references, *predictions)))}
    found, right = (torch.tensor([number[label] for label in labels]) for labels in (predictions, references))
    f1 = _imported(CLASSIFICATION, "macro_f1").multiclass_f1_score
    return float(f1(found, right, num_classes=max(2, len(number)), average="macro"))


def _token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean over rows of F1 between the bags of words, split at white space."""
    return float(np.mean([_bag_f1(p.split(), r.split()) for p, r in zip(predictions, references, strict=True)]))


def _bag_f1(found: list[str], right: list[str]) -> float:
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else float(found == right)


def _squad(key: str) -> Callable[[Sequence[str], Sequence[str]], float]:
    def compute(predictions: Sequence[str], references: Sequence[str]) -> float:
        found = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)]
        right = [{"id": str(i), "answers": {"text": [t], "answer_start": [0]}} for i, t in enumerate(references)]
        return float(_imported(TEXT, f"squad_{key}").squad(found, right)[key]) / 100

    return compute


def _error_rate(function: str, metric: str) -> Callable[[Sequence[str], Sequence[str]], float]:
    def compute(predictions: Sequence[str], references: Sequence[str]) -> float:
        return float(getattr(_imported(TEXT, metric), function)(list(predictions), list(references)))

    return compute


def _of_corpus(function: str, metric: str) -> Callable[[Sequence[str], Sequence[str]], float]:
    """sacrebleu's, with its defaults: chrF2 of up to six characters; BLEU-4 of 13a tokens, smoothed."""

    def compute(predictions: Sequence[str], references: Sequence[str]) -> float:
        return float(getattr(_imported(SACREBLEU, metric), function)(list(predictions), [list(references)]).score)

    return compute


def _calibration_error(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """The mean gap between confidence and accuracy in bins of equal width, weighted by their rows."""
    error = _imported(CLASSIFICATION, "ece").binary_calibration_error
    # Rounded above 1, they would be taken for logits; a model that diverged has no confidence at all.
    known = torch.tensor(confidences).nan_to_num(0.0).clamp(0, 1)
    return float(error(known, torch.tensor(right).long(), n_bins=BINS, norm="l1"))


TEXT, CLASSIFICATION = "torchmetrics.functional.text", "torchmetrics.functional.classification"
SACREBLEU = "sacrebleu"  # torchmetrics' own chrF counts n-grams that a short text cannot have as missed
LOSSES = ("loss", "loss_before", "worst_loss")
"""What an evaluation during training gives besides the metric; less is better."""

METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", _share_equal),
        Metric("accuracy", "accuracy", _share_equal, CLASSES),
        Metric("macro_f1", "macro F1", _macro_f1, CLASSES, library=CLASSIFICATION),
        Metric("token_f1", "token F1", _token_f1),
        Metric("squad_exact_match", "SQuAD exact match", _squad("exact_match"), library=TEXT),
        Metric("squad_f1", "SQuAD F1", _squad("f1"), library=TEXT),
        Metric("chrf", "chrF", _of_corpus("corpus_chrf", "chrf"), unit="", library=SACREBLEU),
        Metric("bleu", "BLEU", _of_corpus("corpus_bleu", "bleu"), unit="", library=SACREBLEU),
        Metric("wer", "WER", _error_rate("word_error_rate", "wer"), higher_is_better=False, library=TEXT),
        Metric("cer", "CER", _error_rate("char_error_rate", "cer"), higher_is_better=False, library=TEXT),
        Metric("ece", "calibration error", _calibration_error, CONFIDENCES, False, library=CLASSIFICATION),
    )
}
