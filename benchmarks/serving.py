"""Hundreds of adapters on one base in one process, with stock PEFT: what they cost while loading, waiting and answering.

    python benchmarks/serving.py --output serving.json        # also writes serving.md
    python benchmarks/serving.py --quick

Adapters are loaded from a folder one by one, as `recipes/serve_mixed_batch.py` does. At each number of them the seconds
and the memory of an adapter are taken, and the forward of a batch whose rows ask for 1, 4 or 16 different adapters is
timed against the same batch on the base without any, in turns (ratios are within a round).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import measure
import options
import report
import torch
from peft import PeftModel
from workload import Workload, load_model, random_batch

LOADED = (1, 16, 64, 256)
ROWS, DIFFERENT = 16, (1, 4, 16)


def main() -> None:
    parser = options.parser_of(__doc__ or "")
    parser.add_argument("--loaded", type=int, nargs="+", default=None, help=f"numbers of adapters {LOADED}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    facts = report.run_facts(given.threads)
    loaded = sorted(given.loaded or (LOADED[:2] if given.quick else LOADED))
    workload = Workload(shapes="tiny" if given.quick else "smollm2", layers="top_third", tasks=ROWS, support=1, query=1)
    model = load_model(workload, None).eval()
    rows = random_batch(workload).support.inputs
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = ["default"]
        for n in loaded:
            before, began = measure.resident(), time.monotonic()
            new = [f"task {i}" for i in range(len(names), n)]
            for name in new:
                model.load_adapter(folder, adapter_name=name)
            seconds = time.monotonic() - began
            measure.give_back()
            grown = measure.resident() - before
            names += new
            cost = {"load_seconds": seconds / len(new), "bytes": grown / len(new)} if new else {}
            batches = {d: _timed(model, rows, names, d, options.rounds(given)) for d in DIFFERENT if d <= n}
            found.append({"adapters": n, **cost, "batches": batches})
            print(f"    {n} adapters", flush=True)
    values = {"program": "serving", "run": facts, "workload": workload.to_dict(), "rows": ROWS, "found": found}
    report.write_json(values, given.output)
    shown = _table(found)
    if given.output:
        report.write_text(shown, given.output.with_suffix(".md"))
    print(f"\n{shown}")


@torch.no_grad()
def _timed(model: PeftModel, rows: dict[str, Any], names: list[str], different: int, rounds: int) -> dict[str, Any]:
    """Seconds of a forward over those without adapters, where so many different adapters are asked for."""
    asked = [names[i % different * (len(names) // different)] for i in range(ROWS)]
    assert len(set(asked)) == different

    def base() -> None:
        with model.disable_adapter():
            model(**rows)

    def mixed() -> None:
        model(**rows, adapter_names=asked)

    base(), mixed()
    ratios = []
    for _ in range(rounds):
        without = _seconds(base)
        ratios.append(_seconds(mixed) / without)
    return report.spread(ratios)


def _seconds(call: Callable[[], None]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _table(found: list[dict[str, Any]]) -> str:
    columns = ["adapters", "s to load one", "MB each", *(f"batch with {d}, x base" for d in DIFFERENT)]
    return report.table(
        columns,
        [
            [
                row["adapters"],
                row.get("load_seconds"),
                row["bytes"] / 1e6 if "bytes" in row else None,
                *(report.shown(row["batches"].get(d)) for d in DIFFERENT),
            ]
            for row in found
        ],
    )


if __name__ == "__main__":
    main()
