"""The head of a model: one over words that makes its logits, or one over classes that tasks have of their own."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import HEADS, WITH_HEAD, head_modules

OTHER_PROBLEMS = ("regression", "multi_label_classification")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")


def check_head(model: PeftModel, adapter: str) -> None:
    """Raise `MetaPeftError` unless the model has a head, and the adapter has it if it is one over classes."""
    base: Any = model.get_base_model()
    heads = list(head_modules(model, adapter))
    if type(base).__name__.endswith(CLASSIFIERS):
        if not heads or model.peft_config[adapter].task_type not in WITH_HEAD:
            raise MetaPeftError(
                f"The classification head of {type(base).__name__} is not part of the adapter, so no task could have one of"
                f" its own, or its LoraConfig does not say that it is one of a classifier, so load would refuse it: give"
                f" LoraConfig a task_type of SEQ_CLS or TOKEN_CLS. The head has to be called {' or '.join(HEADS)}."
            )
        problem, n_classes = getattr(base.config, "problem_type", None), base.config.num_labels
        if n_classes < 2 or problem in OTHER_PROBLEMS:
            raise MetaPeftError(
                f"{type(base).__name__} has num_labels={n_classes} and problem_type={problem!r}; expected two classes or"
                " more, of which each row has one. Numbers (regression) and several classes of one row have no loss here:"
                " load the base with num_labels of 2 or more and no problem_type."
            )
    elif heads:
        raise MetaPeftError(
            f"modules_to_save holds {[path for path, _ in heads]}, but {type(base).__name__} is no classifier: remove it."
        )
    elif not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise MetaPeftError(
            f"{type(base).__name__} has no language-modelling head, so it has no loss: load it with AutoModelForCausalLM,"
            " AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq or AutoModelForMaskedLM, or with a classification head."
        )
