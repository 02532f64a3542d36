"""Next-token prediction: ``-log p(token_p | tokens before p)`` at the labelled positions p of each row.

The logits for position p stand at position p - 1. A row matches exactly when greedy decoding from the prompt writes its
labels, each of which is predicted given those before it, so nothing has to be generated to know.
"""

from __future__ import annotations

from torch import Tensor

from meta_peft.objectives.labelled_tokens import LabelledTokens


def next_tokens(labels_BL: Tensor) -> Tensor:
    return labels_BL[:, 1:]


CAUSAL_LM = LabelledTokens(next_tokens, {"use_cache": False}, causal=True)
