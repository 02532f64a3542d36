"""The model card of a meta-learned adapter."""

from __future__ import annotations

from typing import Any

from meta_peft.model_kinds import KINDS
from meta_peft.sidecar import Sidecar

EXAMPLES = {
    "causal_lm": '{"input": "...", "target": "..."}',
    "speech_seq2seq": '{"audio": "sound.wav", "text": "..."}',
    "sequence_classification": '{"text": "...", "label": "..."}',
    "token_classification": '{"tokens": ["..."], "tags": ["..."]}',
}


def model_card(sidecar: Sidecar, repo_id: str | None, results: dict[str, Any]) -> str:
    """Markdown with the metadata that the hub reads. `results` may hold a ``table`` in Markdown."""
    where = repo_id or "path/or/hub-id-of-this-adapter"
    inner = sidecar.inner
    optimizer = type(inner.optimizer).__name__
    each = "entry of a LoRA matrix" if inner.rates_per_entry else "LoRA matrix"
    rates = f"learned, one for each {each}" if inner.learn_rates else f"{inner.lr:g}"
    table = f"\n## Held-out tasks\n\n{results['table']}\n" if "table" in results else ""
    return f"""---
base_model: {sidecar.base.name}
library_name: peft
pipeline_tag: {KINDS[sidecar.objective].pipeline}
tags:
- lora
- peft
- meta-learning
- meta_peft
---

# A LoRA adapter that adapts

Meta-learned with `meta_peft` ({sidecar.algorithm}): an initialisation from which {sidecar.base.name} adapts to a new
task in a few gradient steps on about {sidecar.shots} examples. Inner loop: {inner.steps} steps of {optimizer}, rates
{rates}.

## Use

```python
import meta_peft

model = meta_peft.load("{sidecar.base.name}", "{where}")
model, metrics = meta_peft.adapt(model, [{EXAMPLES.get(sidecar.objective, EXAMPLES["causal_lm"])}])
```

It is an ordinary PEFT adapter too: `PeftModel.from_pretrained(base, "{where}")` loads it, not yet adapted to any task.
{table}"""
