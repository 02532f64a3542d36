"""An adapter in a folder of its own for each task of a file; what is there already is not made again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from meta_peft.adaptation.stacks import MOST, Adapted, Support, adapted_stacks, check_hold_back, encoded_support
from meta_peft.adapters import hub
from meta_peft.adapters.adapter_files import CONFIG, WEIGHTS
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.hub import NOTE
from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.tasks import TaskSet
from meta_peft.utils.atomic_files import write_file
from meta_peft.utils.checked import whole
from meta_peft.utils.digests import of_file, of_texts

FAILED = "failed.json"
STACKS = 16  # read and encoded at a time


@dataclass(frozen=True)
class Made:
    """One task's adapter: where it is, its metrics, and whether it was there before."""

    task: str
    folder: Path
    metrics: dict[str, float]
    already: bool = False


@dataclass
class FolderOfAdapters:
    """What `adapt_folder` did: how many adapters it `made`, how many were there `already`, and why tasks `failed`."""

    made: int = 0
    already: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def adapt_folder(
    model: PeftModel,
    tasks: Any,
    folder: str | Path,
    *,
    task_column: str | Sequence[str] = "task",
    steps: int | None = None,
    hold_back: float = 0.0,
    tasks_per_forward: int = 8,
    done: Callable[[Made], object] = lambda made: None,
) -> FolderOfAdapters:
    """Adapt to each task of a table of rows, and write each adapter as soon as it is there.

    A task whose adapter is in `folder` already, made of the same rows from the same start with the same options, is left
    as it is: a call that was stopped goes on when it is made again. A task that fails does not stop the others; what
    failed, and why, is in ``failed.json``. Few tasks are in memory at a time.

    Args:
        model: from `meta_peft.load`, or trained by `MetaTrainer`; it is left unchanged.
        tasks: whatever `TaskSet.of` takes: the path of a JSONL file, a `datasets.Dataset`, rows by task name. Unless it is
            a `TaskSet`, columns may have the names that they had in training, which renamed them.
        folder: where the folders of adapters go, each called as its task, with ``_`` for what is no letter or digit.
        task_column: names the task of each row.
        steps: as for `adapt_many`.
        hold_back: the same.
        tasks_per_forward: the same.
        done: called for every adapter.

    Raises:
        MetaPeftError: the rows cannot be read, or the model carries no meta-learned adapter.
    """
    learned = hub.meta_learned(model)
    check_hold_back(hold_back)
    steps = None if steps is None else whole("steps", steps, 0, MOST)
    tasks_per_forward = whole("tasks_per_forward", tasks_per_forward, 1, MOST)
    named, folder = TaskSet.of(tasks, task_column, row_form=learned.sidecar.row_form), Path(folder)
    folders = {name: folder / short for name, short in folder_names(named.names, folder).items()}
    start = _start(model, learned, steps, hold_back)
    result = FolderOfAdapters()
    size = STACKS * tasks_per_forward
    for i in range(0, len(named), size):
        missing: dict[str, list[dict[str, Any]]] = {}
        digests: dict[str, str] = {}
        for name in named.names[i : i + size]:
            rows = named.rows(name)
            digests[name] = of_texts(start, json.dumps(rows, sort_keys=True, default=repr))
            metrics = _made_before(folders[name], digests[name])
            if metrics is None:
                missing[name] = rows
            else:
                result.already += 1
                done(Made(name, folders[name], metrics, already=True))
        for name, adapted in _adapted(model, learned, missing, result.failed, steps, hold_back, tasks_per_forward):
            adapted.save(folders[name])
            _write_note(folders[name], name, digests[name], adapted.metrics)
            result.made += 1
            done(Made(name, folders[name], adapted.metrics))
        _write_failed(folder, result.failed)
    return result


def folder_names(tasks: Sequence[str], beside: Path) -> dict[str, str]:
    """Tasks' names as names of folders in `beside`, nothing outside it.

    Those that would be the same get a digest behind them. A task that has a folder from an earlier call keeps it, and no
    other one gets it.
    """
    plain = {task: _plain(task) for task in tasks}
    count = Counter(name.casefold() for name in plain.values())

    def name_of(task: str, name: str) -> str:
        with_digest = f"{name[:40]}-{of_texts(task)[:12]}"
        if name.casefold() == FAILED or len(name.encode()) > 200:  # the summary has a place of its own
            return with_digest
        if (there := _task_in(beside / name)) is not None:
            return name if there == task else with_digest
        return name if count[name.casefold()] == 1 and _task_in(beside / with_digest) != task else with_digest

    return {task: name_of(task, name) for task, name in plain.items()}


def _task_in(folder: Path) -> str | None:
    """The task that the note in `folder` names, whatever became of its adapter; None where no note names one."""
    try:
        return str(json.loads((folder / NOTE).read_text(encoding="utf-8"))["task"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(task: str) -> str:
    name = "".join(character if character.isalnum() or character in "-_." else "_" for character in task).strip(".")
    return name or "_"


def _adapted(
    model: PeftModel,
    learned: hub.MetaLearned,
    tasks: Mapping[str, list[dict[str, Any]]],
    failed: dict[str, str],
    steps: int | None,
    hold_back: float,
    tasks_per_forward: int,
) -> Iterator[tuple[str, Adapted]]:
    """Tasks with their adapters; reasons of those that fail go into `failed`."""
    supports: dict[str, Support] = {}
    for name, rows in tasks.items():
        try:
            supports[name] = encoded_support(learned, name, rows, hold_back)
        except MetaPeftError as error:
            failed[name] = str(error)
    stacks = adapted_stacks(model, supports, steps=steps, tasks_per_forward=tasks_per_forward, failed=failed)
    for stack in stacks:
        for name, adapted in stack.items():
            if all(bool(weight.isfinite().all()) for weight in adapted.weights.values()):
                yield name, adapted
            else:
                failed[name] = (
                    f"After {adapted.metrics['steps']} steps the weights are not finite: take fewer steps, or hold back"
                    " rows (hold_back), so that the best step counts."
                )


def _start(model: PeftModel, learned: hub.MetaLearned, steps: int | None, hold_back: float) -> str:
    """A digest of all that an adapter depends on besides its task's rows."""
    sidecar, base = learned.sidecar, model.get_base_model()
    weights = hashlib.sha256()
    for tensor in (*FastWeights(model, learned.adapter).parameters().values(), sidecar.log_rates):
        weights.update(tensor.detach().cpu().float().numpy().tobytes())
    kept = [str(base.dtype), *(str(getattr(base, f"is_loaded_in_{bits}bit", False)) for bits in (4, 8))]
    how: list[Any] = [
        sidecar.inner.to_dict(),
        asdict(BaseIdentity.of(base)),
        asdict(sidecar.facts),
        sidecar.prompt_format.to_dict(),
    ]
    how += [sidecar.max_length, sorted(sidecar.rate_factors.items()), steps, float(hold_back), *kept]
    return of_texts(weights.hexdigest(), json.dumps(how, sort_keys=True))


def read_note(folder: Path) -> dict[str, Any]:
    """What the note beside an adapter says: its `task`, `metrics`, the `digest` of what it was made of.

    Empty if there is none, or none of this adapter: its weights are others than those that the note was written for, or
    are not known, as in notes of earlier versions.
    """
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        whole = (folder / CONFIG).is_file() and note["weights"] == of_file(folder / WEIGHTS)
        return {**note, "metrics": dict(note["metrics"])} if whole else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_note(folder: Path, task: str, digest: str, metrics: Mapping[str, float]) -> None:
    note = {"task": task, "digest": digest, "weights": of_file(folder / WEIGHTS), "metrics": dict(metrics)}
    write_file(folder / NOTE, json.dumps(note, ensure_ascii=False) + "\n")


def _made_before(folder: Path, digest: str) -> dict[str, float] | None:
    """The metrics of the adapter in `folder`, if it is there and was made of this."""
    note = read_note(folder)
    return note["metrics"] if note.get("digest") == digest else None


def _write_failed(folder: Path, failed: Mapping[str, str]) -> None:
    if failed:
        write_file(folder / FAILED, json.dumps(failed, indent=1, ensure_ascii=False) + "\n")
    else:
        (folder / FAILED).unlink(missing_ok=True)
