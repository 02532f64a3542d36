"""The held-out episodes of a comparison as text, for `setfit_episodes.py` and others that know nothing of this package.

    python benchmarks/episodes.py --config recipes/configs/decoder_classification.yaml --seeds 0 1 --output_dir compared

Takes every option of `meta-peft evaluate --config` and draws what that draws: the same tasks, support rows and query rows.
Writes ``episodes.json`` into the output folder. Texts are those that the model reads; labels are numbers of classes.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from meta_peft.base.new_adapter import new_model
from meta_peft.base.tokenizers import tokenizer_for
from meta_peft.commands.run_options import run_options
from meta_peft.comparison.compare import held_out_episodes
from meta_peft.objectives import CLASSIFYING, objective_name
from meta_peft.protocol import ProtocolArguments
from meta_peft.run_tasks.task_loading import run_tasks
from meta_peft.tasks.encoding import tokenizer_of
from meta_peft.training.trainer import MetaTrainer
from meta_peft.utils.atomic_files import write_file


def main(words: list[str]) -> Path:
    model_args, task_args, args, comparison, protocol = run_options(
        words, ProtocolArguments, prog="benchmarks/episodes.py"
    )
    tasks, _ = run_tasks(task_args, args)
    processor = tokenizer_for(model_args)
    drawn = []
    for seed in protocol.seeds:
        own = copy.copy(args)
        own.seed = own.data_seed = seed
        model = new_model(model_args, seed)
        if objective_name(model.get_base_model()) not in CLASSIFYING:
            sys.exit("Episodes are written as text and class: give a config with a classification head.")
        data = {"train_dataset": tasks["train"], "eval_dataset": tasks["validation"]}  # classes are numbered over all
        trainer = MetaTrainer(model, args=own, **data, processing_class=processor)
        for episode in held_out_episodes(trainer, tasks["test"], comparison.max_test_tasks):
            rows = {part: _as_text(getattr(episode, part), processor) for part in ("support", "query")}
            drawn.append({"seed": seed, "task": episode.task, **rows})
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "episodes.json", json.dumps(drawn, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(drawn)} episodes in {folder / 'episodes.json'}")
    return folder / "episodes.json"


def _as_text(rows: list[dict[str, Any]], processor: Any) -> list[dict[str, Any]]:
    words = tokenizer_of(processor)
    return [
        {"text": words.decode(row["input_ids"], skip_special_tokens=True), "label": int(row["labels"][0])}
        for row in rows
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
