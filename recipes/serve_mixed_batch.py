"""Serve a folder of adapted adapters on one base: python recipes/serve_mixed_batch.py BASE FOLDER < requests.jsonl

Each line of the input is a request, `{"task": ..., "prompt": ...}`, with the name of an adapter's folder as its task; each
line of the output is the same with its answer. Requests are answered in batches that mix tasks, in the order they came.
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


def load(base: str, folder: str) -> tuple[PeftModel, object]:
    """The base with every adapter of the folder, and its tokenizer, which has to pad on the left to write on the right."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    first, *others = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(first), adapter_name=first.name)
    for path in others:
        model.load_adapter(str(path), adapter_name=path.name)
    return model.eval(), tokenizer


@torch.no_grad()
def answer(model: PeftModel, tokenizer: object, requests: list[dict], max_new_tokens: int = 32) -> list[str]:
    """What each request's own adapter writes behind its prompt."""
    inputs = tokenizer([request["prompt"] for request in requests], return_tensors="pt", padding=True).to(model.device)
    names = [request["task"] for request in requests]
    written = model.generate(**inputs, adapter_names=names, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def served(model: PeftModel, tokenizer: object, lines: Iterable[str]) -> Iterator[dict]:
    requests = map(json.loads, lines)
    while batch := list(islice(requests, BATCH)):
        for request, text in zip(batch, answer(model, tokenizer, batch), strict=True):
            yield {**request, "answer": text}


if __name__ == "__main__":
    for done in served(*load(*sys.argv[1:3]), sys.stdin):
        print(json.dumps(done, ensure_ascii=False), flush=True)
