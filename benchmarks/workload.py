"""What is computed: a random model of SmolLM2-135M's shapes with a LoRA adapter, and random episodes.

Everything comes from a seed, so that each process builds the same weights and the same tokens and nothing is
downloaded. A model's speed does not depend on what its weights say.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from meta_peft.types import EpisodeBatch, Params, Rows

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "tiny": {  # for trials: every part is there, nothing takes time
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": 160,
    },
}
SPECIAL_TOKENS = 3  # beginning, end, padding
MAX_COMPLETION = 4


@dataclass(frozen=True)
class Workload:
    """One meta-gradient: of which model, on how much data, through how many inner steps.

    Args:
        shapes: "smollm2" or "tiny".
        base: "fp32", "nf4" or "int8".
        layers: LoRA on the linear layers of "all" decoder layers, or of the "top_third" of them.
        tasks, support, query: tasks, and rows of each.
        tokens: of each row, its completion of 1 to 4 tokens included; no row is padded.
        steps: inner steps of plain gradient descent.
        order: "first" or "second".
    """

    shapes: str = "smollm2"
    base: str = "fp32"
    layers: str = "all"
    tasks: int = 8
    support: int = 8
    query: int = 8
    tokens: int = 16
    steps: int = 3
    order: str = "second"
    lr: float = 0.03
    rank: int = 8
    seed: int = 0

    @property
    def second_order(self) -> bool:
        return self.order == "second"

    @property
    def adapted_layers(self) -> list[int]:
        n_layers = SHAPES[self.shapes]["num_hidden_layers"]
        return list(range(0 if self.layers == "all" else n_layers - n_layers // 3, n_layers))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def save_base(workload: Workload, folder: Path) -> None:
    """Write the random base model, for `from_pretrained` to quantise."""
    _random_base(workload).save_pretrained(folder)


def load_model(workload: Workload, folder: Path | None) -> PeftModel:
    """The frozen base in its precision with the adapter; `folder` holds the base if it is to be quantised.

    In training mode without any dropout: in evaluation mode bitsandbytes' 8-bit layers quantise activations too, and
    what is differentiated would not be what is computed.
    """
    base = _random_base(workload) if workload.base == "fp32" else _quantised_base(workload, folder)
    base.requires_grad_(False)
    torch.manual_seed(workload.seed + 1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        target_modules=list(LINEARS),
        layers_to_transform=workload.adapted_layers,
    )
    model = get_peft_model(base, config)
    with torch.no_grad():  # zero at first, and not any more after the first outer step
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


def random_batch(workload: Workload) -> EpisodeBatch:
    """Episodes of random tokens; the last 1 to 4 tokens of each row are its completion."""
    generator = torch.Generator().manual_seed(workload.seed + 2)
    vocabulary = SHAPES[workload.shapes]["vocab_size"]

    def rows(per_task: int) -> Rows:
        n_rows = workload.tasks * per_task
        shape = (n_rows, workload.tokens)
        ids = torch.randint(SPECIAL_TOKENS, vocabulary, shape, generator=generator)
        completion = torch.randint(1, MAX_COMPLETION + 1, (n_rows, 1), generator=generator)
        prompt = torch.arange(workload.tokens) < workload.tokens - completion
        return Rows(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.masked_fill(prompt, -100), workload.tasks
        )

    return EpisodeBatch(rows(workload.support), rows(workload.query), [f"task {t}" for t in range(workload.tasks)])


def keywords(rows: Rows) -> dict[str, Any]:
    """What the ordinary forward of a model is called with to give a loss."""
    return {**rows.inputs, "labels": rows.labels_BL, "use_cache": False}


def lora_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """By the model's own names, as `functional_call` takes them."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def saved_names(params: Params) -> Params:
    """The same values by the names that PEFT saves them under, which are meta_peft's."""
    return {name.replace(".default.", "."): value for name, value in params.items()}


def _random_base(workload: Workload) -> PreTrainedModel:
    torch.manual_seed(workload.seed)
    config = LlamaConfig(
        **SHAPES[workload.shapes],
        initializer_range=0.04,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _quantised_base(workload: Workload, folder: Path | None) -> PreTrainedModel:
    import bitsandbytes as bnb

    config = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[workload.base]
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    quantised = [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    expected = len(LINEARS) * SHAPES[workload.shapes]["num_hidden_layers"]
    if len(quantised) != expected:  # a device map with cpu entries can quietly load a dense model
        raise RuntimeError(f"Expected {expected} quantised layers, the model has {len(quantised)}.")
    for layer in quantised:
        if isinstance(layer, bnb.nn.Linear4bit):
            # Else CPUs with AVX512-BF16 repack the weight in place at the first forward without gradients, which
            # rounds it and has no derivative. meta_peft switches it off; here it is off for everybody.
            layer.support_avx512bf16_for_cpu = False
    return model


def parts(batch: EpisodeBatch, size: int | None) -> list[EpisodeBatch]:
    """The batch in parts of at most `size` tasks; None keeps all together."""
    size = size or batch.n_tasks
    return [batch.part(t, min(t + size, batch.n_tasks)) for t in range(0, batch.n_tasks, size)]
