"""Ways to choose the tasks of an outer step, side by side at equal outer steps.

    python benchmarks/task_sampling.py --output task_sampling.json        # also writes task_sampling.md
    python benchmarks/task_sampling.py --tasks FILE.jsonl --samplings uniform by_size
    python benchmarks/task_sampling.py --quick

For each seed and each way one run from the same start, with the same number of outer steps of as many tasks; then the
same held-out tasks are adapted to, on the same episodes. A curriculum's one forward of each task at the start is not
counted. Differences from uniform are paired: each task is averaged over the seeds, and the interval is a bootstrap over
tasks. With fewer outer steps than one round of the tasks takes, difficulty and gradients are known of no task, so the
training tasks are cut to `--train_tasks`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import choosing
import numpy as np
import report

from meta_peft.tasks.sampling import SAMPLINGS


def main() -> None:
    parser = choosing.parser_of(__doc__ or "")
    parser.add_argument("--samplings", nargs="+", default=list(SAMPLINGS), choices=SAMPLINGS)
    parser.add_argument("--train_tasks", type=int, default=48, help="at most so many (48)")
    given = choosing.given_options(parser)
    facts, began = report.run_facts(given.threads), time.monotonic()
    base, (train, test) = choosing.Base(given), choosing.splits(given)
    kept = sorted(np.random.default_rng(2).permutation(len(train))[: given.train_tasks])
    train = train.select(train.names[i] for i in kept)
    names = ["uniform", *(name for name in given.samplings if name != "uniform")]
    scores = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            for name in names:
                alone = name.startswith("by_gradient")  # the others give the same but for rounding
                run = base.trained(
                    given, train, Path(folder), seed=seed, task_sampling=name, deterministic_reduction=alone
                )
                scores[name].append(choosing.adapted(run, test, given, seed))
                print(f"    seed {seed}, {name}: {scores[name][-1]['loss'].mean():.3f}", flush=True)
            more = {"tasks": test.names, "training_tasks": len(train), "seconds": time.monotonic() - began}
            choosing.record("task_sampling", given, facts, scores, **more)
    print(f"\n{choosing.table(choosing.compared(scores))}")


if __name__ == "__main__":
    main()
