"""Ways to choose support rows, against random ones at equal shots.

    python benchmarks/support_selection.py --output support_selection.json        # also writes support_selection.md
    python benchmarks/support_selection.py --tasks FILE.jsonl
    python benchmarks/support_selection.py --quick

An adapter is meta-trained with random support rows, once for each seed. Then every held-out task is adapted to with
support rows chosen in each way from all rows of the task that are not query rows. Query rows are the same for all, so
differences from random are paired: each task is averaged over the seeds, and the interval is a bootstrap over tasks.
Random rows and the random part of balanced are drawn anew for each seed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import choosing
import report

from meta_peft.run_tasks.base_view import BaseView
from meta_peft.tasks.support_selection import SELECTIONS, SupportSelection


def main() -> None:
    parser = choosing.parser_of(__doc__ or "")
    parser.add_argument("--selections", nargs="+", default=list(SELECTIONS), choices=SELECTIONS)
    given = choosing.given_options(parser)
    facts, began = report.run_facts(given.threads), time.monotonic()
    base, (train, test) = choosing.Base(given), choosing.splits(given)
    names = ["random", *(name for name in given.selections if name != "random")]
    scores = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            run = base.trained(given, train, Path(folder), seed=seed)
            view = BaseView(run.loss_fn.model, run.data_collator)
            for name in names:
                selection = None if name == "random" else SupportSelection(name, view, seed)
                scores[name].append(choosing.adapted(run, test, given, seed, selection))
                print(f"    seed {seed}, {name}: {scores[name][-1]['loss'].mean():.3f}", flush=True)
            more = {"tasks": test.names, "seconds": time.monotonic() - began}
            choosing.record("support_selection", given, facts, scores, **more)
    print(f"\n{choosing.table(choosing.compared(scores))}")


if __name__ == "__main__":
    main()
