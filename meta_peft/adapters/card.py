"""Model cards: of a meta-learned adapter, and of one that was adapted to a task.

What cannot be known is left out: a base without an id on the hub is named by its last folder alone, and a licence is
never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meta_peft.adapters.card_file import TAG
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.base.model_kinds import KINDS
from meta_peft.evaluation.metrics import METRICS
from meta_peft.objectives import CLASSIFYING
from meta_peft.tasks.labelling import of_classes

EXAMPLES = {
    "causal_lm": '{"input": "...", "target": "..."}',
    "speech_seq2seq": '{"audio": "sound.wav", "text": "..."}',
    "sequence_classification": '{"text": "...", "label": "..."}',
    "token_classification": '{"tokens": ["..."], "tags": ["..."]}',
}
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


def model_card(
    sidecar: Sidecar,
    repo_id: str | None,
    results: CardResults | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    ask_hub: bool = False,
) -> str:
    """Markdown, with the metadata that the hub reads and shows at its head.

    Args:
        sidecar: of the adapter.
        repo_id: its id on the hub, if it has one or is going to.
        results: of an evaluation.
        options: of the training run, by name.
        ask_hub: whether the base's licence is asked for on the hub, where it is not on this machine.
    """
    results = results or CardResults()
    where = repo_id or "path/or/hub-id-of-this-adapter"
    licence = licence_of(sidecar.base.name, ask_hub=ask_hub)
    parts = [
        f"---\n{_metadata(sidecar, where, results, licence)}\n---",
        "# A LoRA adapter that adapts",
        _what(sidecar),
        _tasks(sidecar, results),
        _use(sidecar, where),
        _found(sidecar, results),
        _training(options or {}),
        _licence(sidecar.base.name, licence),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapted_card(
    base: str,
    objective: str,
    metrics: Mapping[str, float],
    repo_id: str | None = None,
    *,
    num_labels: int = 0,
    label_names: Sequence[str] = (),
) -> str:
    """A short card of an adapter that was adapted to one task.

    Args:
        base: name of the base model.
        objective: what the base is for.
        metrics: as `Adapted` has them.
        repo_id: its id on the hub, if it is going to have one.
        num_labels: of the base's head, if it has one.
        label_names: of the classes of the task.
    """
    from huggingface_hub import ModelCardData

    kind, tags = KINDS[objective], ["lora", "peft", TAG]
    data = ModelCardData(**_base(base), library_name="peft", pipeline_tag=kind.pipeline, tags=tags)
    seen = "\n".join(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in metrics.items())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# A LoRA adapter adapted to one task",
        f"Adapted with `meta_peft`, from a meta-learned initialisation for {_shown(base)}, on a handful of examples.",
        "Classes: " + ", ".join(f"`{name}`" for name in label_names) + "." if label_names else "",
        f"## Use\n\n{_stock(kind.auto, repo_id or 'path/of/this-adapter', num_labels)}",
        "## Adaptation\n\nOn the rows that it was adapted on, which say whether adaptation worked and not how well it does"
        f" on others.\n\n| | |\n| --- | ---: |\n{seen}",
        _licence(base, licence_of(base)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether a model or data set of this name can be one on the hub: not where there is a folder or file of the name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "" and not Path(name).exists()


def licence_of(base: str, *, ask_hub: bool = False) -> dict[str, str]:
    """What the base's own card says of its licence: some of ``license``, ``license_name`` and ``license_link``."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if is_hub_id(base):
        kept = try_to_load_from_cache(base, "README.md")
        card = kept if isinstance(kept, str) else base if ask_hub else None
    else:
        card = str(Path(base) / "README.md") if base and (Path(base) / "README.md").is_file() else None
    if card is None:
        return {}
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # there is none, or it cannot be read: then nothing is said
        return {}
    names = ("license", "license_name", "license_link")
    return {name: str(found.get(name)) for name in names if found.get(name) is not None}


def _metadata(sidecar: Sidecar, where: str, results: CardResults, licence: Mapping[str, str]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metric = METRICS[results.metric] if results.metric else None
    found = [
        EvalResult(
            task_type=KINDS[sidecar.objective].pipeline,
            dataset_type=results.sources[0] if results.sources else "held-out-tasks",
            dataset_name=f"{len(results.tasks)} held-out tasks",
            metric_type=metric.name,
            metric_value=round(float(row[metric.name]), 4),
            metric_name=f"{metric.title} after {_steps(row['steps'])} on {_examples(sidecar)}",
        )
        for row in results.rows
        if metric is not None
    ]
    data = ModelCardData(
        **_base(sidecar.base.name),
        **dict[str, Any](licence),
        library_name="peft",
        pipeline_tag=KINDS[sidecar.objective].pipeline,
        tags=["lora", "peft", "meta-learning", TAG],
        datasets=list(results.sources) or None,
        metrics=[metric.name] if metric else None,
        model_name=Path(where).name if found else None,
        eval_results=found or None,
    )
    return str(data.to_yaml())


def _base(name: str) -> dict[str, Any]:
    """The base model, and what an adapter is to it. The hub takes ids alone, and refuses a card with a path."""
    return {"base_model": name, "base_model_relation": "adapter"} if is_hub_id(name) else {}


def _shown(base: str) -> str:
    """The base's id, or the last part of its path: the others say nothing to anybody else."""
    return base if is_hub_id(base) else Path(base).name or "the base model"


def _what(sidecar: Sidecar) -> str:
    inner = sidecar.inner
    each = "entry of a LoRA matrix" if inner.rates_per_entry else "LoRA matrix"
    each += " and step" if inner.rates_per_step else ""
    rates = f"learned, one for each {each}" if inner.learn_rates else f"{inner.lr:g}"
    fast, matrices = len(inner.fast_names(sidecar.names)), len(sidecar.names)
    some = "" if fast == matrices else f" {fast} of its {matrices} matrices adapt, the others are meta-learned alone."
    return (
        f"Meta-learned with `meta_peft` ({sidecar.algorithm}): an initialisation from which {_shown(sidecar.base.name)}"
        f" adapts to a new task in a few gradient steps on about {_examples(sidecar)}. Inner loop: {inner.steps} steps"
        f" of {type(inner.optimizer).__name__}, rates {rates}.{some}"
    )


def _tasks(sidecar: Sidecar, results: CardResults) -> str:
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


def _training(options: Mapping[str, Any]) -> str:
    shown = {name: str(getattr(value, "value", value)).replace("|", "\\|") for name, value in options.items()}
    lines = "\n".join(f"| `{name}` | {value} |" for name, value in shown.items())
    return f"## Training\n\n| option | value |\n| --- | --- |\n{lines}" if options else ""


def _licence(base: str, licence: Mapping[str, str]) -> str:
    said = licence.get("license_name") or licence.get("license")
    under = f" {_shown(base)} is under `{said}`." if said else ""
    return f"## Licence\n\nThe adapter is of use with its base model only, whose licence and terms of use hold.{under}"


def _stock(auto: str, where: str, classes: int) -> str:
    labels = f", num_labels={classes}" if classes else ""
    return f"""```python
from peft import PeftConfig, PeftModel
from transformers import {auto}

base = {auto}.from_pretrained(PeftConfig.from_pretrained("{where}").base_model_name_or_path{labels})
model = PeftModel.from_pretrained(base, "{where}")
```"""


def _use(sidecar: Sidecar, where: str) -> str:
    classes = sidecar.facts.num_labels or 0 if sidecar.objective in CLASSIFYING else 0
    example = EXAMPLES.get(sidecar.objective, EXAMPLES["causal_lm"])
    return f"""## Use

```python
import meta_peft

model = meta_peft.load("{_shown(sidecar.base.name)}", "{where}")
model, metrics = meta_peft.adapt(model, [{example}])
print(metrics)
```

`model` is then an ordinary `PeftModel` whose active adapter is adapted to the task of the examples. Without
`meta_peft`, PEFT loads it as an ordinary adapter, not yet adapted to any task:

{_stock(KINDS[sidecar.objective].auto, where, classes)}"""


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _examples(sidecar: Sidecar) -> str:
    labelling = sidecar.judged.labelling
    return f"{sidecar.shots} examples{of_classes(None if labelling is None else labelling.ways)}"


def _found(sidecar: Sidecar, results: CardResults) -> str:
    if results.table is None:
        return ""
    shown = f"\n\n![Curves over adaptation steps]({results.picture})" if results.picture else ""
    return (
        f"## Held-out tasks\n\n{results.table}{shown}\n\nEach start is adapted to each held-out task on"
        f" {_examples(sidecar)}, at the rate that does best on validation tasks."
    )
