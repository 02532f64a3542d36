"""``meta-peft inspect``: what is in an adapter folder, which base it fits, and how to use it."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from meta_peft.errors import MetaPeftError

ABOUT = "What is in an adapter folder, or, with --estimate, where a run's memory goes."
USAGE = "--adapter DIR_OR_ID [options]"
EXAMPLES = """examples:
  meta-peft inspect --adapter outputs/mine --plot rates.png
  meta-peft inspect --estimate --config mine.yaml    (has a --help)"""
LINES = """To use it:
  meta-peft adapt --adapter {folder} --support examples.jsonl --output adapted
  meta-peft evaluate --adapter {folder} --tasks held_out.jsonl
  model = meta_peft.load({base!r}, {folder!r})
  model, metrics = meta_peft.adapt(model, rows)"""
PLAIN = """An ordinary PEFT adapter, without a sidecar: meta_peft cannot adapt it further. To use it:
  model = PeftModel.from_pretrained(base, {folder!r})"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR_OR_ID", help="a folder or a hub id")
    parser.add_argument("--json", action="store_true", help="all values as JSON")
    parser.add_argument("--plain", action="store_true", help="one rate a line instead of a map")
    parser.add_argument("--plot", metavar="FILE", help="also write the map as a picture, such as rates.png")


def run(options: argparse.Namespace) -> int:
    from meta_peft.adapters.hub import fetch
    from meta_peft.adapters.rate_map import RateMap, check_picture
    from meta_peft.adapters.sidecar import JSON, Sidecar

    if options.plot:
        check_picture(options.plot)
    folder = fetch(options.adapter)
    if not (folder / JSON).is_file():
        return _adapted(folder, options)
    sidecar = Sidecar.read(folder)
    fast = sidecar.inner.fast_names(sidecar.names)
    by_matrix = None if sidecar.inner.rates_per_entry else RateMap.of(fast, sidecar.log_rates)
    if options.plot:
        if by_matrix is None:
            raise MetaPeftError(
                "--plot draws one rate for each LoRA matrix; here each entry has its own: leave it out."
            )
        by_matrix.figure().savefig(options.plot, dpi=150)
    if options.json:
        print(json.dumps(_values(sidecar, fast), indent=1, ensure_ascii=False))
        return 0
    for name, value in _facts(sidecar, fast):
        print(f"{name:15} {value}")
    if by_matrix is not None and options.plain:
        for name, rate in zip(fast, sidecar.log_rates[-1].exp().tolist(), strict=True):
            print(f"  {rate:.2e}  {name}")
    elif by_matrix is not None:
        print(f"\n{by_matrix.as_text(shutil.get_terminal_size().columns)}")
    print(f"\n{LINES.format(folder=options.adapter, base=sidecar.base.name)}")
    return 0


def _facts(sidecar: Any, fast: list[str]) -> list[tuple[str, str]]:
    rates, inner = sidecar.log_rates.exp(), sidecar.inner
    facts = [
        ("base model", f"{sidecar.base.name}  {sidecar.base.sizes}"),
        ("algorithm", f"{sidecar.algorithm}, {sidecar.shots} shots, {inner.steps} inner steps"),
        ("inner optimizer", str(inner.to_dict()["optimizer"])),
    ]
    if sidecar.objective != "causal_lm":
        facts.append(("objective", f"{sidecar.objective}  {' '.join(sidecar.facts.label_names)}".rstrip()))
    facts.append(("LoRA matrices", str(len(sidecar.names))))
    how = "learned" if inner.learn_rates else "fixed"
    each = ", each entry its own" if inner.rates_per_entry else ", each step its own" if inner.rates_per_step else ""
    facts.append(("inner rates", f"{rates.min():.2e} to {rates.max():.2e}, {how}{each}"))
    if any(sidecar.rate_factors):
        found = ", ".join(f"{factor:g} for {steps}" for steps, factor in sorted(sidecar.rate_factors.items()) if steps)
        facts.append(("rate factors", f"{found} steps"))
    template = sidecar.prompt_format
    facts.append(("prompt", f"{template.prompt_template!r} {template.completion_template!r}"))
    if str(sidecar.row_form):
        facts.append(("rows", str(sidecar.row_form)))
    if len(fast) < len(sidecar.names):
        facts.append(("fast weights", f"{len(fast)} of them, those with {inner.fast!r} in their names"))
    return facts


def _values(sidecar: Any, fast: list[str]) -> dict[str, Any]:
    from dataclasses import asdict

    rates = None if sidecar.inner.rates_per_entry else sidecar.log_rates.exp().T.tolist()
    return {
        "base": asdict(sidecar.base),
        "algorithm": sidecar.algorithm,
        "inner": sidecar.inner.to_dict(),
        "objective": sidecar.objective,
        "shots": sidecar.shots,
        "matrices": list(sidecar.names),
        "rates": None if rates is None else dict(zip(fast, rates, strict=True)),
        "rate_factors": sidecar.rate_factors,
        "prompt_format": sidecar.prompt_format.to_dict(),
        "judged": asdict(sidecar.judged),
        "row_form": asdict(sidecar.row_form),
    }


def _adapted(folder: Path, options: argparse.Namespace) -> int:
    """A folder without a sidecar: an adapter that was adapted to a task, or any other of PEFT."""
    from meta_peft.adaptation.folder import read_note
    from meta_peft.adapters.adapter_files import CONFIG
    from meta_peft.utils.checked import read_object

    if options.plot:
        raise MetaPeftError(f"--plot draws learned rates, and {folder} has none: leave it out.")
    config = read_object(folder / CONFIG, "the config of a PEFT adapter")
    note = read_note(folder)
    if options.json:
        print(json.dumps({"config": config, **note}, indent=1, ensure_ascii=False))
        return 0
    print(f"{'base model':15} {config.get('base_model_name_or_path')}")
    print(f"{'LoRA':15} rank {config.get('r')}, alpha {config.get('lora_alpha')}, {config.get('target_modules')}")
    if note:
        print(f"{'adapted to':15} {note.get('task')}  {note.get('metrics')}")
    print(f"\n{PLAIN.format(folder=options.adapter)}")
    return 0
