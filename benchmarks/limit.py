"""One meta-gradient against the matrix products that it cannot avoid.

    python benchmarks/limit.py --preset so_fp32_8x8+8 --output limit.json
    python benchmarks/limit.py --quick

`products.py` counts the products. Each kind is timed alone, in this process, in the shapes in which meta_peft has it,
with the model's own weights one after the other; the sum is the roof. Roof and step are measured in turns, and a step
is compared with the mean of the roofs before and after it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import options
import presets
import report
import torch
from contenders import ours
from products import Product, Roof, count
from workload import Workload, load_model, random_batch, save_base

from meta_peft.utils.allocator import keep_freed_memory


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    if given.malloc == "keep":
        keep_freed_memory()
    output: dict[str, Any] = {"program": "limit", "run": report.run_facts(given.threads), "rows": []}
    for row in presets.rows_of(given.preset, options.workload_changes(given), quick=given.quick):
        print(f"{row.name}: {row.workload}", flush=True)
        settings = {"memory": given.memory, "tasks_per_forward": given.tasks_per_forward}
        output["rows"].append({"name": row.name, **measured(row.workload, settings, options.rounds(given))})
        report.write_json(output, given.output)
        print(f"\n{table(output['rows'][-1])}\n")


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__ or "")
    names = [row.name for row in presets.ROWS] + ["all"]
    parser.add_argument("--preset", nargs="+", default=[], choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--memory", type=options.memory_mode, help="what MAML keeps: a mode or a number")
    parser.add_argument("--tasks_per_forward", type=options.tasks_or_all, help="a number, or all")
    options.add_workload_options(parser)
    return parser.parse_args()


def measured(workload: Workload, settings: options.Settings, rounds: int) -> dict[str, Any]:
    """Counts, rates, and the seconds of roof and step in each round."""
    with tempfile.TemporaryDirectory() as folder:
        if workload.base != "fp32":
            save_base(workload, Path(folder))
        model = load_model(workload, Path(folder))
    batch = random_batch(workload)
    products = count(model, batch, workload, settings["tasks_per_forward"])
    roof, step = Roof(model, list(products)), ours(model, batch, workload, **settings)
    step()
    roof.seconds()  # both warm
    seconds, roofs = [], [roof.seconds()]
    for number in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        roofs.append(roof.seconds())
        print(f"    round {number + 1}: step {seconds[-1]:.3g} s, roof {_total(products, roofs[-1]):.3g} s", flush=True)
    totals = [_total(products, times) for times in roofs]
    around = [(before + after) / 2 for before, after in pairwise(totals)]
    return {
        "workload": workload.to_dict(),
        "settings": settings,
        "products": _parts(products, roofs),
        "roof_seconds": report.spread(totals),
        "step_seconds": report.spread(seconds),
        "step_over_roof": report.spread([s / r for s, r in zip(seconds, around, strict=True)]),
    }


def table(found: dict[str, Any]) -> str:
    columns = ["part", "rows", "products", "GFLOP", "GFLOP/s", "roof s"]
    lines = [
        [line[name] for name in ("part", "rows", "count", "gflop", "gflop_per_s", "seconds")]
        for line in found["products"]
    ]
    gflop, seconds = sum(line["gflop"] for line in found["products"]), found["roof_seconds"]["median"]
    lines.append(["all", "", sum(line["count"] for line in found["products"]), gflop, gflop / seconds, seconds])
    lines.append(["ours", "", "", "", gflop / found["step_seconds"]["median"], found["step_seconds"]["median"]])
    return f"{report.table(columns, lines)}\n\nstep over roof: {report.shown(found['step_over_roof'])}"


def _parts(products: dict[Product, int], roofs: list[dict[Product, float]]) -> list[dict[str, Any]]:
    """Products added up by part and by the rows they are of; seconds are medians over passes."""
    grouped: dict[tuple[str, str], list[Product]] = defaultdict(list)
    for product in products:
        grouped[product.part, product.rows].append(product)
    parts = []
    for (part, rows), members in grouped.items():
        gflop = sum(products[p] * p.gflop for p in members)
        seconds = statistics.median(sum(products[p] * times[p] for p in members) for times in roofs)
        line = {"part": part, "rows": rows, "count": sum(products[p] for p in members), "gflop": gflop}
        parts.append({**line, "seconds": seconds, "gflop_per_s": gflop / seconds})
    return parts


def _total(products: dict[Product, int], times: dict[Product, float]) -> float:
    return sum(n * times[product] for product, n in products.items())


if __name__ == "__main__":
    main()
