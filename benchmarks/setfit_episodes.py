"""SetFit (Tunstall et al. 2022, arXiv 2209.11055) on the held-out episodes of a comparison, with its own defaults.

    pip install setfit                                     # in an environment of its own: it wants other versions
    python benchmarks/setfit_episodes.py EPISODES.json --model FOLDER_OR_ID --output setfit.json

A sentence encoder is tuned on pairs of each task's support rows, so that those of one class lie near each other and
those of two apart, and a logistic regression on its vectors sorts the query rows. `--without_tuning` leaves the tuning out.
`EPISODES.json` is what `episodes.py` writes. Needs nothing of meta_peft.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("episodes", type=Path)
    parser.add_argument(
        "--model", required=True, help="a sentence encoder, such as sentence-transformers/all-MiniLM-L6-v2"
    )
    parser.add_argument("--without_tuning", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("setfit.json"))
    given = parser.parse_args(words)
    import setfit
    import torch

    torch.set_num_threads(given.threads)
    found = []
    for number, episode in enumerate(json.loads(given.episodes.read_text(encoding="utf-8"))):
        torch.manual_seed(episode["seed"])
        began = time.monotonic()
        right = _right(episode, given.model, tuned=not given.without_tuning)
        found.append(
            {
                "seed": episode["seed"],
                "task": episode["task"],
                "accuracy": float(np.mean(right)),
                "seconds": time.monotonic() - began,
            }
        )
        print(f"{number + 1}: {episode['task']}: {found[-1]['accuracy']:.2f}", flush=True)
    by_task: dict[str, list[float]] = {}
    for each in found:
        by_task.setdefault(each["task"], []).append(each["accuracy"])
    means = np.array([np.mean(values) for values in by_task.values()])
    draws = np.random.default_rng(0).choice(means, (10_000, len(means))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    result = {
        "command": ["python", Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"setfit": setfit.__version__, "torch": torch.__version__},
        "tuned": not given.without_tuning,
        "accuracy": float(means.mean()),
        "interval": [float(low), float(high)],
        "worst_task": float(means.min()),
        "seconds_per_task": float(np.mean([each["seconds"] for each in found])),
        "episodes": found,
    }
    aside = given.output.with_suffix(".new")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(given.output)
    each = result["seconds_per_task"]
    print(f"accuracy {means.mean():.3f} ({low:.3f} to {high:.3f}) over {len(means)} tasks, {each:.1f} s each")
    return result


def _right(episode: dict[str, Any], model_name: str, *, tuned: bool) -> np.ndarray:
    """Which query rows get their class."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    model = SetFitModel.from_pretrained(model_name)
    support, query = episode["support"], episode["query"]
    if tuned:
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(output_dir=folder, seed=episode["seed"], show_progress_bar=False, report_to="none")
            Trainer(model=model, args=args, train_dataset=Dataset.from_list(support)).train()
    else:
        model.fit([row["text"] for row in support], [row["label"] for row in support], num_epochs=1)
    predicted = np.asarray(model.predict([row["text"] for row in query], show_progress_bar=False))
    return predicted == np.array([row["label"] for row in query])


if __name__ == "__main__":
    main()
