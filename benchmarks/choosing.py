"""What the programs that compare choices share: a base with an adapter, tasks, a run, and paired differences."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from meta_peft import MetaLoraConfig, MetaTrainer, ModelArguments, TaskSet
from meta_peft.base import load_base, load_tokenizer, lora_config, with_adapter
from meta_peft.evaluation.evaluate import curve
from meta_peft.evaluation.intervals import interval
from meta_peft.tasks import EpisodeDataset
from meta_peft.tasks.leakage import find_leakage
from meta_peft.tasks.locale_formatting import locale_formatting
from meta_peft.tasks.support_selection import SupportSelection

LAYERS = list(range(24, 30))  # of SmolLM2's 30: those below run once for each batch of rows
TEST_SHARE = 0.3
Scores = dict[str, list[dict[str, np.ndarray]]]
"""By choice, for each seed, loss and exact match by task ``[T]``."""


def parser_of(program: str) -> argparse.ArgumentParser:
    """What both programs take."""
    parser = argparse.ArgumentParser(description=program, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write JSON; a table goes beside it")
    parser.add_argument("--quick", action="store_true", help="a trial in seconds: a tiny random model")
    parser.add_argument("--tasks", type=Path, help="a JSONL file of tasks in place of locale formatting")
    parser.add_argument("--task_column", default="task", help="the column that names their tasks (task)")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--inner_steps", type=int, default=3, help="in training and in evaluation")
    parser.add_argument("--algorithm", default="fomaml", help="of the meta-training (fomaml)")
    parser.add_argument("--outer_steps", type=int, default=40)
    parser.add_argument("--test_tasks", type=int, default=32, help="at most so many (32)")
    parser.add_argument("--query", type=int, default=8, help="query rows of a task in evaluation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="float32", help="of the base: float32 or bfloat16 (float32)")
    parser.add_argument("--prompt_template", default="{input} ->", help="of the tasks of a file ('{input} ->')")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def given_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    given = parser.parse_args()
    if given.quick:
        given.outer_steps, given.test_tasks, given.query, given.seeds = 2, 3, 2, given.seeds[:2]
    torch.set_num_threads(given.threads)
    return given


def splits(given: argparse.Namespace) -> tuple[TaskSet, TaskSet]:
    """Training and test tasks: locale formatting's, or those of a file, of which every third is for testing."""
    if given.tasks is None:
        of = locale_formatting()
        train, test = of["train"], of["test"]
    else:
        tasks = TaskSet.from_jsonl(given.tasks, given.task_column)
        names = [tasks.names[i] for i in np.random.default_rng(0).permutation(len(tasks))]
        n_test = max(1, round(TEST_SHARE * len(names)))
        train, test = tasks.select(sorted(names[n_test:])), tasks.select(sorted(names[:n_test]))
    copies = {pair.tasks[1] for pair in find_leakage({"train": train, "test": test}).tasks}
    test = test.select(name for name in test.names if name not in copies)  # they would reward memory
    chosen = np.random.default_rng(1).permutation(len(test))[: given.test_tasks]
    test = test.select(test.names[i] for i in sorted(chosen))
    if given.quick:
        train = train.select(train.names[:6])
    return train, test


class Base:
    """A base with LoRA layers, and its tokenizer, for several runs from the same start."""

    def __init__(self, given: argparse.Namespace):
        if given.quick:
            with tempfile.TemporaryDirectory() as folder:
                _save_tiny(Path(folder))
                args = ModelArguments(folder, lora_r=2)
                self.tokenizer, base = load_tokenizer(folder), load_base(args)
        else:
            args = ModelArguments(lora_layers=LAYERS, dtype=given.dtype)
            self.tokenizer, base = load_tokenizer(args.model_name_or_path), load_base(args)
        torch.manual_seed(0)  # LoRA A matrices start at random
        self.model = with_adapter(base, lora_config(args))
        self._start = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}

    def trained(self, given: argparse.Namespace, train: TaskSet, folder: Path, **options: Any) -> MetaTrainer:
        """A trainer after its outer steps, from the same start each time."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._start.items():
                own[name].copy_(value)
        args = MetaLoraConfig(
            output_dir=str(folder),
            algorithm=given.algorithm,
            max_steps=given.outer_steps,
            shots=given.shots,
            query_size=2 if given.quick else 4,
            inner_steps=given.inner_steps,
            tasks_per_step=4,
            learning_rate=3e-3,
            warmup_steps=given.outer_steps // 10,
            max_length=128,
            prompt_template=given.prompt_template,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=max(1, given.outer_steps // 4),
            **options,
        )
        run = MetaTrainer(self.model, args, train_dataset=train, processing_class=self.tokenizer)
        run.train()
        return run


def adapted(
    run: MetaTrainer, tasks: TaskSet, given: argparse.Namespace, seed: int, selection: SupportSelection | None = None
) -> dict[str, np.ndarray]:
    """Query loss and exact match of each task after adaptation ``[T]``. Query rows depend on the seed alone."""
    encoded = tasks.encoded(run.encoding)
    query = min(given.query, min(len(rows) for rows in tasks.rows_of.values()) - given.shots)
    episodes = EpisodeDataset(
        encoded, shots=given.shots, query_size=query, seed=1000 + seed, shuffle=False, selection=selection
    )
    found = curve(run.loss_fn, run.start(), run.batches(list(episodes)), (given.inner_steps,))
    return {"loss": found.loss[:, 0].astype(float), "exact_match": found.score[:, 0].astype(float)}


def compared(scores: Scores) -> list[dict[str, Any]]:
    """A row for each choice: means over tasks, and paired differences from the first one, with 95 % intervals over tasks.

    Each task is averaged over the seeds first.
    """
    reference = next(iter(scores))
    by_task = {
        name: {key: np.mean([one[key] for one in of_seeds], axis=0) for key in ("loss", "exact_match")}
        for name, of_seeds in scores.items()
    }
    rows = []
    for name, values in by_task.items():
        row: dict[str, Any] = {"choice": name, "seeds": len(scores[name])}
        for key, of_tasks in values.items():
            row[key], row[f"worst_{key}"] = (
                float(of_tasks.mean()),
                float(of_tasks.max() if key == "loss" else of_tasks.min()),
            )
            if name != reference:
                difference = of_tasks - by_task[reference][key]
                row[f"{key}_difference"] = float(difference.mean())
                row[f"{key}_interval"] = list(interval(difference))
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    reference = rows[0]["choice"]
    columns = ["choice", "query loss", f"minus {reference} (95 % interval)", "worst task"]
    columns += ["exact match, %", f"minus {reference}, points (95 % interval)"]

    def difference(row: dict[str, Any], key: str, times: float, digits: int) -> str:
        if f"{key}_difference" not in row:
            return ""
        middle, (low, high) = times * row[f"{key}_difference"], (times * bound for bound in row[f"{key}_interval"])
        return f"{middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"

    lines = [
        [
            *(row["choice"], f"{row['loss']:.3f}", difference(row, "loss", 1, 3), f"{row['worst_loss']:.2f}"),
            *(f"{100 * row['exact_match']:.1f}", difference(row, "exact_match", 100, 1)),
        ]
        for row in rows
    ]
    return report.table(columns, lines)


def record(program: str, given: argparse.Namespace, facts: dict[str, Any], scores: Scores, **more: Any) -> None:
    """Write JSON and table of the seeds so far: a run that is stopped keeps those that are done."""
    if given.output is None:
        return
    settings = {n: str(v) if isinstance(v, Path) else v for n, v in vars(given).items() if n != "output"}
    rows = compared(scores)
    found = {"program": program, "run": facts, "settings": settings, "seeds_done": rows[0]["seeds"], "rows": rows}
    by_task = {name: {k: [one[k].tolist() for one in of] for k in of[0]} for name, of in scores.items()}
    report.write_json({**found, **more, "by_task": by_task}, given.output)
    report.write_text(table(rows), given.output.with_suffix(".md"))


def _save_tiny(folder: Path) -> None:
    """A random Llama of two narrow layers with a tokenizer of single bytes."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
