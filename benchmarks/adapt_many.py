"""Adapting many tasks at once on a 4-bit base, against one plain PEFT fine-tuning run for each.

    python benchmarks/adapt_many.py --output adapt_many.json
    python benchmarks/adapt_many.py --quick

`meta_peft.adapt_many` stacks tasks in each forward and scores each before and after. The plain run is what a user of
PEFT writes: put the adapter back to its start, make an optimizer of torch, and step on the same rows as often at the
same rate. Inner Adam has ``eps_root=0`` here, which makes it torch's. Each is a process of its own and they run in turns
(`workers.py`); how far the adapted weights moved is compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import options
import report
import torch
import workers
from agreement import agreement
from contenders import Step
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from workload import (
    SHAPES,
    SPECIAL_TOKENS,
    Workload,
    keywords,
    load_model,
    lora_parameters,
    parts,
    random_batch,
    save_base,
    saved_names,
)

import meta_peft
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.hub import attach
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.types import EpisodeBatch, Params, Rows

PROGRAM = Path(__file__).resolve()
PLAIN = "plain PEFT"
START = "start"
RULES: dict[str, tuple[Any, type[torch.optim.Optimizer]]] = {
    "adam": (meta_peft.Adam(eps_root=0.0), torch.optim.Adam),
    "sgd": (meta_peft.SGD(), torch.optim.SGD),
}
Examples = dict[str, list[dict[str, str]]]


def main() -> None:
    given = parse()
    workload = replace(Workload(base="nf4", tasks=64, support=4, steps=10, lr=2e-3), **options.workload_changes(given))
    if given.quick:
        workload = replace(
            workload, shapes="tiny", tasks=min(workload.tasks, 4), tokens=8, steps=min(workload.steps, 3)
        )
    output: dict[str, Any] = {"program": "adapt_many", "run": report.run_facts(given.threads)}
    output |= {"workload": workload.to_dict(), "optimizer": given.optimizer, **compared(workload, given)}
    report.write_json(output, given.output)
    print(f"\n{table(output)}")


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__ or "")
    parser.add_argument("--optimizer", choices=list(RULES), default="adam")
    parser.add_argument(
        "--tasks_per_forward", nargs="+", type=int, default=[8], help="of adapt_many; each is a contender"
    )
    options.add_workload_options(parser)
    return parser.parse_args()


def compared(workload: Workload, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each, how much longer the plain runs take, and how equal the results are."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_base(workload, folder / "base")
        shared = {"workload": workload.to_dict(), "folder": str(folder / "base"), "optimizer": given.optimizer}
        shared |= {"threads": given.threads, "malloc": given.malloc}
        own = {f"ours tasks_per_forward={n}": n for n in given.tasks_per_forward}
        specs = {name: {**shared, "tasks_per_forward": n} for name, n in {**own, PLAIN: None}.items()}
        outcomes = workers.take_turns(PROGRAM, specs, options.rounds(given), results=folder)
        moved = {
            name: updates(load_file(workers.result_file(folder, i)))
            for i, name in enumerate(specs)
            if "error" not in outcomes[name]
        }
    ratios, agreements = {}, {}
    for name, outcome in outcomes.items():
        if "error" in outcome:
            continue
        outcome["median_seconds"] = statistics.median(outcome["seconds"])
        if name in own and PLAIN in moved:
            pairs = zip(outcomes[PLAIN]["seconds"], outcome["seconds"], strict=True)
            ratios[name] = report.spread([plain / ours for plain, ours in pairs])
            agreements[name] = agreement(moved[name], moved[PLAIN])
    return {"contenders": outcomes, "plain_over_ours": ratios, "agreement": agreements}


def table(output: dict[str, Any]) -> str:
    lines: list[list[Any]] = []
    for name, outcome in output["contenders"].items():
        if "error" in outcome:
            lines.append([name, f"failed: {' '.join(outcome['error'].split())}"[:80]])
            continue
        ratio, same = output["plain_over_ours"].get(name), output["agreement"].get(name) or {}
        lines.append([name, outcome["median_seconds"], report.gib(outcome["peak_bytes"]), report.shown(ratio)])
        lines[-1].append(same.get("relative_error"))
    columns = ["contender", "median s", "peak GiB over the model", "times as fast", "difference of the updates"]
    return report.table(columns, [line + [""] * (len(columns) - len(line)) for line in lines])


# ---- in a worker


def load(spec: dict[str, Any]) -> Callable[[], Step]:
    """The model and the rows; a run gives each task's weights."""
    workload = Workload(**spec["workload"])
    model = load_model(workload, Path(spec["folder"]))
    tokenizer = word_tokenizer(SHAPES[workload.shapes]["vocab_size"])
    examples = as_text(random_batch(workload), tokenizer)
    rows = {task: encoded(rows, tokenizer, workload) for task, rows in examples.items()}
    with torch.no_grad():
        model(**keywords(next(iter(rows.values()))))
    for_meta_peft, for_torch = RULES[spec["optimizer"]]
    if spec["tasks_per_forward"] is None:
        return lambda: plain_runs(model, rows, workload, for_torch)
    rule = meta_peft.InnerRule(for_meta_peft, lr=workload.lr, steps=workload.steps)
    return lambda: adapted_at_once(model, examples, tokenizer, workload, rule, spec["tasks_per_forward"])


def adapted_at_once(
    model: PeftModel,
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
    workload: Workload,
    rule: meta_peft.InnerRule,
    tasks_per_forward: int,
) -> Step:
    """`meta_peft.adapt_many` on a model that carries a sidecar, as one does that was loaded or trained."""
    start = {name: p.detach().clone() for name, p in FastWeights(model).parameters().items()}
    sidecar = Sidecar(
        algorithm="maml",
        inner=rule,
        names=tuple(start),
        log_rates=next(iter(rule.initial_rates(start).values())),
        prompt_format=meta_peft.PromptFormat(),
        max_length=workload.tokens,
        base=BaseIdentity.of(model.get_base_model()),
        shots=workload.support,
    )
    attach(model, sidecar, tokenizer)

    def step(first_tasks: int | None = None) -> Params:  # always all: they go together
        adapted = meta_peft.adapt_many(model, examples, tasks_per_forward=tasks_per_forward)
        return by_task(start, {task: result.weights for task, result in adapted.items()})

    return step


def plain_runs(
    model: PeftModel, rows: dict[str, Rows], workload: Workload, optimizer: type[torch.optim.Optimizer]
) -> Step:
    """One fine-tuning run for each task."""
    parameters = lora_parameters(model)
    start = {name: p.detach().clone() for name, p in parameters.items()}

    def fine_tuned(inputs: dict[str, Any]) -> Params:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(start[name])
        stepper = optimizer(parameters.values(), lr=workload.lr)
        for _ in range(workload.steps):
            stepper.zero_grad()
            model(**inputs).loss.backward()
            stepper.step()
        return saved_names({name: p.detach().clone() for name, p in parameters.items()})

    def step(first_tasks: int | None = None) -> Params:
        some = list(rows.items())[:first_tasks]
        return by_task(saved_names(start), {task: fine_tuned(keywords(inputs)) for task, inputs in some})

    return step


def by_task(start: Params, adapted: dict[str, Params]) -> Params:
    """Every task's weights and the start in one dict; nothing is copied."""
    return {f"{task}: {name}": w for task, named in {START: start, **adapted}.items() for name, w in named.items()}


def updates(weights: Params) -> Params:
    """How far each task's weights moved: the inverse of `by_task`."""
    found = {}
    for key, adapted in weights.items():
        task, name = key.split(": ")
        if task != START:
            found[key] = adapted - weights[f"{START}: {name}"]
    return found


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word for each id: "w7" is token 7."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = [*special.values(), *(f"w{i}" for i in range(SPECIAL_TOKENS, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def as_text(batch: EpisodeBatch, tokenizer: PreTrainedTokenizerFast) -> Examples:
    """The batch's support rows as prompt and completion, with room for the two tokens that encoding adds."""

    def text(ids: Tensor) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))

    examples: Examples = {}
    for name, task in zip(batch.tasks, parts(batch, 1), strict=True):
        examples[name] = []
        for ids, labels in zip(task.support.inputs["input_ids"], task.support.labels_BL, strict=True):
            words, n_completion = ids[1:-1], max(1, int((labels != -100).sum()) - 1)
            prompt, completion = words[:-n_completion], words[-n_completion:]
            examples[name].append({"prompt": text(prompt), "completion": text(completion)})
    return examples


def encoded(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, workload: Workload) -> Rows:
    """One task's rows as `adapt_many` encodes them."""
    encode = meta_peft.PromptFormat().encode
    collate = meta_peft.EpisodeCollator(tokenizer.pad_token_id)
    return collate.rows([[encode(row, tokenizer, workload.tokens) for row in rows]])


if __name__ == "__main__":
    if workers.FLAG in sys.argv:
        workers.serve(load)
    else:
        main()
