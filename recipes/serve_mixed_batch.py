"""Serve a folder of adapted adapters on one base: python recipes/serve_mixed_batch.py BASE FOLDER < requests.jsonl

Each line of the input is a request, `{"task": ..., "prompt": ...}`, with the name of an adapter's folder as its task and
the prompt as it was in training; each line of the output is the same with its answer. Requests are answered in batches
that mix tasks, in the order they came. It takes PEFT and transformers, and no meta_peft.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 16


def adapter_name(task: str) -> str:
    """PEFT's name of a task's adapter: a dot would be taken for a path to a module."""
    return task.replace(".", "_")


def load(base: str, folder: str) -> tuple[PeftModel, object]:
    """The base with every adapter of the folder, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    paths = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
    names = {adapter_name(path.name): path for path in paths}
    if not paths or len(names) < len(paths):
        sys.exit(
            f"{folder} has {len(paths)} adapters with {len(names)} names: expected one or more, each with its own."
        )
    (name, path), *others = names.items()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path, adapter_name=name)
    for name, path in others:
        model.load_adapter(path, adapter_name=name)
    return model.eval(), tokenizer


def bytes_per_adapter(model: PeftModel) -> int:
    """What each adapter takes in memory, on average."""
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    return sum(weight.numel() * weight.element_size() for weight in weights) // len(model.peft_config)


def padded(tokenizer: object, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Prompts behind the token that begins a row in training; padded on the left, to write on the right."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = [[first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
    empty = [max(map(len, rows)) - len(row) for row in rows]
    return {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * n + row for n, row in zip(empty, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(row) for n, row in zip(empty, rows, strict=True)]),
    }


@torch.no_grad()
def answer(model: PeftModel, tokenizer: object, requests: list[dict], max_new_tokens: int = 32) -> list[str]:
    """What each request's own adapter writes behind its prompt."""
    inputs = {n: tensor.to(model.device) for n, tensor in padded(tokenizer, [r["prompt"] for r in requests]).items()}
    names = [adapter_name(request["task"]) for request in requests]
    stop = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    written = model.generate(**inputs, **stop, adapter_names=names, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def served(model: PeftModel, tokenizer: object, lines: Iterable[str]) -> Iterator[dict]:
    requests = map(json.loads, lines)
    while batch := list(islice(requests, BATCH)):
        for request, text in zip(batch, answer(model, tokenizer, batch), strict=True):
            yield {**request, "answer": text}


if __name__ == "__main__":
    model, tokenizer = load(*sys.argv[1:3])
    print(f"{len(model.peft_config)} adapters of {bytes_per_adapter(model)} bytes each", file=sys.stderr)
    for done in served(model, tokenizer, sys.stdin):
        print(json.dumps(done, ensure_ascii=False), flush=True)
