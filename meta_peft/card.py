"""The model card of a meta-learned adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meta_peft.metrics import METRICS
from meta_peft.model_kinds import KINDS
from meta_peft.sidecar import Sidecar

EXAMPLES = {
    "causal_lm": '{"input": "...", "target": "..."}',
    "speech_seq2seq": '{"audio": "sound.wav", "text": "..."}',
    "sequence_classification": '{"text": "...", "label": "..."}',
    "token_classification": '{"tokens": ["..."], "tags": ["..."]}',
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NAMED = 30  # held-out tasks that are named

CITATION = """@software{meta_peft,
  title = {meta_peft: parameter-efficient meta-learning for language models},
  year = {2026}
}"""


@dataclass(frozen=True)
class CardResults:
    """What an evaluation found, and on what: all of it may be missing.

    Args:
        table: in Markdown.
        rows: of the table, as `Report.rows` has them, of the meta-learned start alone.
        metric: the name of their score.
        tasks: held-out tasks by name.
        trained_on: the number of training tasks.
        sources: ids on the hub of the data.
        picture: the file beside the card that shows the curves.
    """

    table: str | None = None
    rows: Sequence[dict[str, Any]] = ()
    metric: str | None = None
    tasks: Sequence[str] = ()
    trained_on: int | None = None
    sources: Sequence[str] = field(default_factory=tuple)
    picture: str | None = None


def model_card(sidecar: Sidecar, repo_id: str | None, results: CardResults | None = None) -> str:
    """Markdown, with the metadata that the hub reads and shows at its head."""
    results = results or CardResults()
    where = repo_id or "path/or/hub-id-of-this-adapter"
    parts = [
        f"---\n{_metadata(sidecar, where, results)}\n---",
        "# A LoRA adapter that adapts",
        _what(sidecar),
        _training(sidecar, results),
        _use(sidecar, where),
        _found(sidecar, results),
        "## Licence\n\nThe adapter is of use with its base model only, whose licence and terms of use hold: see its card.",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(sidecar: Sidecar, where: str, results: CardResults) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metric = METRICS[results.metric] if results.metric else None
    found = [
        EvalResult(
            task_type=KINDS[sidecar.objective].pipeline,
            dataset_type=results.sources[0] if results.sources else "held-out-tasks",
            dataset_name=f"{len(results.tasks)} held-out tasks",
            metric_type=metric.name,
            metric_value=round(float(row[metric.name]), 4),
            metric_name=f"{metric.title} after {row['steps']} steps on {sidecar.shots} examples",
        )
        for row in results.rows
        if metric is not None
    ]
    data = ModelCardData(
        **_base(sidecar.base.name),
        library_name="peft",
        pipeline_tag=KINDS[sidecar.objective].pipeline,
        tags=["lora", "peft", "meta-learning", "meta_peft"],
        datasets=list(results.sources) or None,
        metrics=[metric.name] if metric else None,
        model_name=Path(where).name if found else None,
        eval_results=found or None,
    )
    return str(data.to_yaml())


def _base(name: str) -> dict[str, Any]:
    """The base model, and what an adapter is to it; only a base on the hub has a relation there."""
    is_id = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return {"base_model": name, **({"base_model_relation": "adapter"} if is_id else {})}


def _what(sidecar: Sidecar) -> str:
    inner = sidecar.inner
    each = "entry of a LoRA matrix" if inner.rates_per_entry else "LoRA matrix"
    each += " and step" if inner.rates_per_step else ""
    rates = f"learned, one for each {each}" if inner.learn_rates else f"{inner.lr:g}"
    return (
        f"Meta-learned with `meta_peft` ({sidecar.algorithm}): an initialisation from which {sidecar.base.name} adapts to a"
        f" new task in a few gradient steps on about {sidecar.shots} examples. Inner loop: {inner.steps} steps of"
        f" {type(inner.optimizer).__name__}, rates {rates}."
    )


def _training(sidecar: Sidecar, results: CardResults) -> str:
    if results.trained_on is None:
        return ""
    columns = sidecar.judged.task_column
    said = [f"Learned from {results.trained_on} tasks, which the column {' and '.join(columns)} of the data names."]
    if results.sources:
        said.append(f"Data: {', '.join(results.sources)}.")
    if results.tasks:
        names = [f"`{name}`" for name in sorted(results.tasks)[:NAMED]]
        more = f" and {len(results.tasks) - NAMED} more" if len(results.tasks) > NAMED else ""
        said.append(f"Held-out tasks: {', '.join(names)}{more}.")
    return "## Tasks\n\n" + " ".join(said)


def _use(sidecar: Sidecar, where: str) -> str:
    example = EXAMPLES.get(sidecar.objective, EXAMPLES["causal_lm"])
    return f"""## Use

```python
import meta_peft

model = meta_peft.load("{sidecar.base.name}", "{where}")
model, metrics = meta_peft.adapt(model, [{example}])
```

It is an ordinary PEFT adapter too: `PeftModel.from_pretrained(base, "{where}")` loads it, not yet adapted to any task."""


def _found(sidecar: Sidecar, results: CardResults) -> str:
    if results.table is None:
        return ""
    shown = f"\n\n![Curves over adaptation steps]({results.picture})" if results.picture else ""
    return (
        f"## Held-out tasks\n\n{results.table}{shown}\n\nEach start is adapted on {sidecar.shots} examples of each held-out"
        " task, at the rate that does best on validation tasks."
    )
