"""Many adapters on one base in one process: all of them in PEFT, or waiting beside it for one of a few slots.

    python benchmarks/serving.py --output serving.json        # also writes serving.md
    python benchmarks/serving.py --quick

At each number of adapters the seconds to load one into PEFT and its memory are taken, and the forward of a batch whose
rows ask for 1, 4 or 16 different adapters is timed against the same batch on the base without any, in turns (ratios are
within a round). `recipes/serve_mixed_batch.py` keeps 16 adapters in PEFT and the others' weights beside it: for it the
seconds to read an adapter from its folder and to put it into a slot are taken.
"""

from __future__ import annotations

import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import options
import report
import torch
from peft import PeftModel
from safetensors.torch import load_file
from workload import Workload, load_model, random_batch

LOADED = (16, 64, 128)
ROWS, DIFFERENT = 16, (1, 4, 16)
WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    parser = options.parser_of(__doc__ or "")
    parser.add_argument("--loaded", type=int, nargs="+", default=None, help=f"numbers of adapters {LOADED}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    facts = report.run_facts(given.threads)
    loaded = sorted(given.loaded or (LOADED[:1] if given.quick else LOADED))
    workload = Workload(shapes="tiny" if given.quick else "smollm2", layers="top_third", tasks=ROWS, support=1, query=1)
    model = load_model(workload, None).eval()
    rows = random_batch(workload).support.inputs
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = ["default"]
        for n in loaded:
            before, seconds = measure.resident(), []
            for i in range(len(names), n):
                seconds.append(_seconds(lambda name=f"task {i}": model.load_adapter(folder, adapter_name=name)))
            measure.give_back()
            grown = (measure.resident() - before) / len(seconds)
            names += [f"task {i}" for i in range(len(names), n)]
            batches = {d: _timed(model, rows, names, d, options.rounds(given)) for d in DIFFERENT if d <= n}
            found.append({"adapters": n, "load_seconds": seconds, "bytes": grown, "batches": batches})
            print(f"    {n} adapters", flush=True)
        slots = _slots(load_model(workload, None).eval(), Path(folder), options.rounds(given))
    values = {"program": "serving", "run": facts, "workload": workload.to_dict(), "rows": ROWS}
    report.write_json({**values, "found": found, "slots": slots}, given.output)
    shown = _table(found, slots)
    if given.output:
        report.write_text(shown, given.output.with_suffix(".md"))
    print(f"\n{shown}")


@torch.no_grad()
def _timed(model: PeftModel, rows: dict[str, Any], names: list[str], different: int, rounds: int) -> dict[str, Any]:
    """A forward over that of the base alone, where so many different adapters are asked for."""
    asked = [names[i % different * (len(names) // different)] for i in range(ROWS)]

    def base() -> None:  # not by disable_adapter, which takes longer the more adapters there are
        model(**rows, adapter_names=["__base__"] * ROWS)

    def mixed() -> None:
        model(**rows, adapter_names=asked)

    base(), mixed()
    ratios = []
    for _ in range(rounds):
        without = _seconds(base)
        ratios.append(_seconds(mixed) / without)
    return report.spread(ratios)


def _slots(model: PeftModel, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds that an adapter takes to be read, and to be put into a slot, with as many slots as the recipe has."""
    recipe = runpy.run_path(str(report.ROOT / "recipes" / "serve_mixed_batch.py"))
    model.load_adapter(folder, adapter_name="0")
    for i in range(1, recipe["BATCH"]):
        model.load_adapter(folder, adapter_name=str(i))
    served, tasks = recipe["Served"](model, None, {}), [str(i) for i in range(2 * recipe["BATCH"])]
    read = [_seconds(lambda task=t: served.weights.update({task: load_file(folder / WEIGHTS)})) for t in tasks]
    put = [_seconds(lambda task=t: served.slots([task])) for _ in range(rounds) for t in tasks]
    return {"read_seconds": read, "put_seconds": put}


def _seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _table(found: list[dict[str, Any]], slots: dict[str, Any]) -> str:
    columns = ["adapters in PEFT", "s to load the last one", "MB each", *(f"{d} in a batch, x base" for d in DIFFERENT)]
    rows = [
        [
            row["adapters"],
            row["load_seconds"][-1],
            row["bytes"] / 1e6,
            *(report.shown(row["batches"].get(d)) for d in DIFFERENT),
        ]
        for row in found
    ]
    read, put = (statistics.median(slots[key]) for key in ("read_seconds", "put_seconds"))
    return f"{report.table(columns, rows)}\n\nInto one of 16 slots: {read:.2g} s to read, {put:.2g} s to put there."


if __name__ == "__main__":
    main()
