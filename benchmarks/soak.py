"""A long run with flat memory: thousands of outer steps of a tiny model, with everything that a run does besides.

    python benchmarks/soak.py --output benchmarks/results/scaling/soak.json

`MetaTrainer` with episodes drawn anew at every step, rows of different lengths, a checkpoint every 100 steps and an
evaluation every 250. After each step the resident memory and the number of open files are read. Printed and recorded: the
peaks of each quarter of the run, and the last quarter's over the second's, which should be at most 1.02. The first
quarter is left out: allocators and caches fill up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import report
import torch
from adapt_many import word_tokenizer
from transformers import TrainerCallback
from workload import SHAPES, SPECIAL_TOKENS, Workload, load_model

from meta_peft import MetaLoraConfig, MetaTrainer

FLAT = 1.02


class Watch(TrainerCallback):
    """Resident bytes and open files after each outer step."""

    def __init__(self) -> None:
        self.process, self.resident, self.files = psutil.Process(), [], []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resident.append(self.process.memory_info().rss)
        self.files.append(self.process.num_fds())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write JSON")
    parser.add_argument("--steps", type=int, default=2000, help="outer steps (2000)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(Path(folder), given.steps, watch)
        run.train()
    output = {"program": "soak", "run": report.run_facts(1), "seconds": time.monotonic() - began}
    output |= {"steps": given.steps, **quarters(watch)}
    report.write_json(output, given.output)
    print(f"\n{table(output)}")


def trainer(folder: Path, steps: int, watch: Watch) -> MetaTrainer:
    args = MetaLoraConfig(
        output_dir=str(folder),
        max_steps=steps,
        tasks_per_step=4,
        shots=2,
        query_size=2,
        inner_steps=2,
        max_length=24,
        save_strategy="steps",
        save_steps=100,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=250,
        logging_steps=50,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return MetaTrainer(
        load_model(Workload(shapes="tiny"), None),
        args,
        train_dataset=tasks(24, seed=0),
        eval_dataset={f"held out {name}": rows for name, rows in tasks(4, seed=1).items()},
        processing_class=word_tokenizer(SHAPES["tiny"]["vocab_size"]),
        callbacks=[watch],
    )


def tasks(n: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """A word to answer with, whatever the input of 2 to 16 words is."""
    rng = np.random.default_rng(seed)
    vocabulary = SHAPES["tiny"]["vocab_size"]

    def words(length: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(SPECIAL_TOKENS, vocabulary, length))

    found = {}
    for task in range(n):
        answer = words(1)
        found[f"task {task}"] = [{"input": words(int(rng.integers(2, 17))), "target": answer} for _ in range(16)]
    return found


def quarters(watch: Watch) -> dict[str, Any]:
    """Peaks of each quarter, and how flat they are."""
    parts = [[int(max(part)) for part in np.array_split(values, 4)] for values in (watch.resident, watch.files)]
    resident, files = parts
    return {
        "peak_resident_bytes": resident,
        "peak_open_files": files,
        "last_over_second": resident[3] / resident[1],
        "target": FLAT,
        "flat": resident[3] / resident[1] <= FLAT and files[3] <= files[1],
    }


def table(output: dict[str, Any]) -> str:
    lines = [
        [f"{i + 1}", f"{peak / 1e6:.1f}", files]
        for i, (peak, files) in enumerate(zip(output["peak_resident_bytes"], output["peak_open_files"], strict=True))
    ]
    text = report.table(["quarter", "peak resident MB", "most open files"], lines)
    verdict = "flat" if output["flat"] else "NOT flat"
    return f"{text}\n\nlast quarter / second: {output['last_over_second']:.4f} (at most {FLAT}): {verdict}"


if __name__ == "__main__":
    main()
