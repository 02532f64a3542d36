"""How many digits of a meta-gradient are right, by precision of the base and by memory mode.

    python benchmarks/precision.py --output benchmarks/results/engine/precision.json

One meta-gradient of the demo's tasks on the real small model (SmolLM2-135M-Instruct, LoRA on all linear layers, B not
zero), against the same in float64 with the graphs of all inner steps kept. The adapter, the tasks and the tokens are the
same everywhere; fast weights are in float64 beside a float64 base, else in float32. For each: the relative error of the
whole gradient ``|g - g64| / |g64|`` and the cosine between the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from report import run_facts, table, write_json

from meta_peft import (
    MAML,
    SGD,
    Adam,
    AdapterLoss,
    EpisodeCollator,
    EpisodeDataset,
    InnerRule,
    PromptFormat,
    meta_gradient,
)
from meta_peft.base import load_base, load_tokenizer, with_adapter
from meta_peft.config import ModelArguments
from meta_peft.params import flatten
from meta_peft.tasks.locale_formatting import locale_formatting

RULES = {"sgd, 0.003": InnerRule(SGD(), lr=0.003, steps=3), "adam, 0.002": InnerRule(Adam(), lr=0.002, steps=3)}
MODES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("unrolled", {"memory": "unrolled"}, {}),
    ("replay", {"memory": "replay"}, {}),
    ("last graph kept", {"memory": 1}, {}),
    ("replay, checkpointed layers", {"memory": "replay"}, {"checkpoint": True}),
    ("finite differences", {"memory": "finite_differences"}, {"second_order": False}),
    ("first order", {"first_order": True}, {"second_order": False}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="support rows and as many query rows of a task")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    reference: dict[str, torch.Tensor] = {}
    for precision in ("float64", "float32", "bfloat16", "nf4", "int8"):
        model = _model(precision)
        batch = _batch(options.tasks, options.rows)
        for name, rule in RULES.items():
            for mode, algorithm, loss in MODES:
                if mode == "finite differences" and precision == "bfloat16":
                    continue  # refused
                found = _gradient(model, batch, MAML(rule, **algorithm), loss)
                reference.setdefault(name, found)
                exact = reference[name]
                error = float((found - exact).norm() / exact.norm())
                cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
                rows.append({"base": precision, "rule": name, "mode": mode, "error": error, "cosine": cosine})
                print(f"{precision:9} {name:12} {mode:28} {error:.1e}  cosine {cosine:.6f}", flush=True)
        del model

    columns = ["base", "inner rule", "mode", "relative error", "cosine"]
    shown = [[r["base"], r["rule"], r["mode"], f"{r['error']:.1e}", f"{r['cosine']:.6f}"] for r in rows]
    print("\n" + table(columns, shown))
    write_json({"program": "precision", "run": run_facts(options.threads), "rows": rows}, options.output)


def _model(precision: str) -> Any:
    quantised = {"nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}.get(precision, {})
    args = ModelArguments(
        dtype="bfloat16" if precision == "bfloat16" else "float32", lora_target_modules=["all-linear"], **quantised
    )
    base = load_base(args)
    if precision == "float64":
        base = base.double()
    from meta_peft.base import lora_config

    torch.manual_seed(0)
    model = with_adapter(base, lora_config(args))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(parameter.dtype)
            if precision == "float64":
                parameter.data = parameter.data.double()
    return model


def _batch(n_tasks: int, rows: int) -> Any:
    tokenizer = load_tokenizer(ModelArguments().model_name_or_path)
    tasks = locale_formatting()["validation"].encoded(PromptFormat("{input} ->", " {target}"), tokenizer, 256)
    episodes = EpisodeDataset(tasks, shots=rows, query_size=rows, seed=0, length=n_tasks)
    return EpisodeCollator(tokenizer.pad_token_id)([episodes[i] for i in range(n_tasks)])


def _gradient(model: Any, batch: Any, algorithm: MAML, options: dict[str, Any]) -> torch.Tensor:
    result = meta_gradient(AdapterLoss(model, **options), batch, algorithm)
    return flatten(result.grads.adapter).double()


if __name__ == "__main__":
    main()
