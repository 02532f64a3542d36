"""Serve a folder of adapted adapters on one base: python recipes/serve_mixed_batch.py BASE FOLDER < requests.jsonl

Each line of the input is a request, `{"task": ..., "prompt": ...}`, with the name of an adapter's folder as its task and
the prompt as it was in training; each line of the output is the same with its answer. Requests are answered in batches
that mix tasks, in the order they came. PEFT knows as many adapters as a batch has rows, its slots; the weights of all
others wait beside it, since PEFT takes longer to load an adapter the more it has. It takes no meta_peft.
"""

import copy
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 16


@dataclass
class Served:
    """A model with `BATCH` slots, and the weights of every task's adapter."""

    model: PeftModel
    tokenizer: object
    weights: dict[str, dict[str, torch.Tensor]]
    slot_of: dict[str, str] = field(default_factory=dict)  # the task used last comes last

    def slots(self, tasks: Iterable[str]) -> list[str]:
        """The slot of each task's adapter, put there if it is in none; tasks not asked for now make room."""
        tasks = list(tasks)
        for task in dict.fromkeys(tasks):
            slot = self.slot_of.pop(task, None)
            if slot is None:
                free = {str(i) for i in range(BATCH)} - set(self.slot_of.values())
                slot = min(free) if free else self.slot_of.pop(next(t for t in self.slot_of if t not in tasks))
                for name, weight in self.weights[task].items():
                    matrix = name.removesuffix(".weight")
                    self.model.get_parameter(f"{matrix}.{slot}.weight").data.copy_(weight)
            self.slot_of[task] = slot
        return [self.slot_of[task] for task in tasks]


def load(base: str, folder: str) -> Served:
    """The base with its slots, and every adapter of the folder; all must be LoRA of one shape, as meta_peft adapts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    paths = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
    if len({path.joinpath("adapter_config.json").read_text() for path in paths}) != 1:
        sys.exit(f"{folder} has {len(paths)} adapters; expected one or more, all with the same config.")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), paths[0], adapter_name="0")
    for slot in range(1, BATCH):
        model.add_adapter(str(slot), copy.deepcopy(model.peft_config["0"]))
    return Served(model.eval(), tokenizer, {path.name: load_file(path / "adapter_model.safetensors") for path in paths})


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
def answer(served: Served, requests: list[dict], max_new_tokens: int = 32) -> list[str]:
    """What each request's own adapter writes behind its prompt; `BATCH` requests at most."""
    model, tokenizer = served.model, served.tokenizer
    inputs = {n: tensor.to(model.device) for n, tensor in padded(tokenizer, [r["prompt"] for r in requests]).items()}
    stop = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    slots = served.slots(request["task"] for request in requests)
    written = model.generate(**inputs, **stop, adapter_names=slots, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answered(served: Served, lines: Iterable[str]) -> Iterator[dict]:
    requests = map(json.loads, lines)
    while batch := list(islice(requests, BATCH)):
        for request, text in zip(batch, answer(served, batch), strict=True):
            yield {**request, "answer": text}


if __name__ == "__main__":
    for done in answered(load(*sys.argv[1:3]), sys.stdin):
        print(json.dumps(done, ensure_ascii=False), flush=True)
