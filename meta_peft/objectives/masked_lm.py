"""Filling in masked tokens: ``-log p(label_p | all tokens of the row as given)`` at the labelled positions p.

The inputs hold the mask token where something is to be predicted, the labels what was there; both stand at the same
positions. A row matches when every masked token is filled in right, all at once: each is predicted without the others.
"""

from __future__ import annotations

from meta_peft.objectives.labelled_tokens import LabelledTokens

MASKED_LM = LabelledTokens()
