"""Decoder tokens given the encoder's input: ``-log p(label_p | encoder inputs, decoder input tokens up to p)``.

`Rows.labels_BL` are the labels of the decoder. `Rows.inputs` hold the encoder's inputs (``input_ids``, or
``input_features`` for speech) and ``decoder_input_ids``, which are the labels moved one to the right behind the
decoder's start token: labels and logits stand at the same positions. A row matches exactly when greedy decoding writes
its labels.
"""

from __future__ import annotations

from meta_peft.objectives.labelled_tokens import LabelledTokens

SEQ2SEQ_LM = LabelledTokens(options={"use_cache": False})
