"""Tiny random models and batches, built in the process, and what compares them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from meta_peft.frozen.linear import dequantise, quantised_layers
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.types import EpisodeBatch, Params, Rows

VOCAB = 40
QUANTISED = ("nf4", "int8")


def tiny_base(kind: str = "llama", dtype: torch.dtype = torch.float64, *, layers: int = 1, width: int = 16, **options):
    """A random causal language model of a few thousand parameters."""
    torch.manual_seed(0)
    if kind == "gpt2":
        # n_embd etc. are GPT-2's own names. Its default dropout of 0.1 stays: a loss must not depend on it.
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 32}
    else:
        sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "head_dim": width // 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes |= {"vocab_size": VOCAB, "initializer_range": 0.6 * width**-0.5}
    config = AutoConfig.for_model(kind, **{**sizes, **special, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if dtype == torch.float64:
        in_float64(model)
    return model


def in_float64(model: nn.Module) -> None:
    """transformers' RMSNorm rounds to float32 inside; torch's own has the same formula in the dtype of its input."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)


def with_lora(base: nn.Module, *, rank: int = 2, adapter: str = "default", **options) -> PeftModel:
    """`base` with a LoRA adapter whose B matrices are not zero, as they are at the start of a training run."""
    gpt2 = base.config.model_type == "gpt2"
    targets = (
        ["c_attn", "c_proj", "c_fc"]
        if gpt2
        else [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    )
    options = {"target_modules": targets, "fan_in_fan_out": gpt2, "r": rank} | options
    model = get_peft_model(base, LoraConfig(lora_alpha=4, task_type="CAUSAL_LM", **options), adapter)
    randomise(model)
    return model


def randomise(model: PeftModel, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in FastWeights(model).parameters().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (0.2 * noise).to(parameter.dtype)


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float64, **options) -> PeftModel:
    return with_lora(tiny_base(kind, dtype, **options))


def narrow_loss() -> AdapterLoss:
    """The smallest Llama with more than one layer, for what goes through every algorithm or mode."""
    return AdapterLoss(
        with_lora(tiny_base("llama", layers=2, width=8), target_modules=["q_proj", "o_proj", "down_proj"])
    )


def tolerance(name: str) -> float:
    """How closely two computations of the same number agree on the models of `model_of`."""
    return 1e-12 if name in ("llama", "gpt2") else 1e-4


def dense_twin(model: PeftModel, **options) -> PeftModel:
    """The same model and adapter with every bitsandbytes layer replaced by a dense copy of its weight."""
    base = tiny_base("llama", torch.float32, layers=2, width=64)
    source = model.get_base_model()
    state = {}
    for name, tensor in base.state_dict().items():
        path = name.removesuffix(".weight")
        layer = source.get_submodule(path)
        layer = getattr(layer, "base_layer", layer)
        state[name] = dequantise(layer).float() if quantised_layers(layer) else layer.weight.detach()
        assert state[name].shape == tensor.shape
    base.load_state_dict(state)
    twin = with_lora(base, **options)
    FastWeights(twin).load_(dict(FastWeights(model).parameters()))
    return twin


def random_rows(n_tasks: int = 3, per_task: int = 2, length: int = 6, seed: int = 0, pad: str = "right") -> Rows:
    """Rows whose lengths and numbers of labels differ, so that a mean over the wrong axis shows."""
    generator = torch.Generator().manual_seed(seed)
    n_rows = n_tasks * per_task
    ids = torch.randint(3, VOCAB, (n_rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(n_rows):
        missing, unlabelled = row % 3, 1 + (row * 2 + row // per_task) % 2
        empty = slice(length - missing, length) if pad == "right" else slice(0, missing)
        mask[row, empty] = 0
        ids[row, empty], labels[row, empty] = 2, -100
        start = 0 if pad == "right" else missing
        labels[row, start : start + unlabelled] = -100
    return Rows({"input_ids": ids, "attention_mask": mask}, labels, n_tasks)


def repeated(rows: Rows, times: int) -> Rows:
    """The rows of all tasks, so many times."""
    inputs = {n: t.repeat(times, *[1] * (t.dim() - 1)) for n, t in rows.inputs.items()}
    return Rows(inputs, rows.labels_BL.repeat(times, 1), rows.n_tasks * times)


def random_batch(
    n_tasks: int = 3, support: int = 2, query: int = 2, *, pad: str = "right", seed: int = 0
) -> EpisodeBatch:
    rows = (
        random_rows(n_tasks, support, seed=2 * seed, pad=pad),
        random_rows(n_tasks, query, seed=2 * seed + 1, pad=pad),
    )
    return EpisodeBatch(*rows, [f"task {t}" for t in range(n_tasks)])


def plain_loss(model: PeftModel, fast: Params, rows: Rows) -> Tensor:
    """The loss of one task the ordinary way: PEFT's own forward, all logits, no stack. `fast` is ``[out, in]``."""
    named = {name.replace(".weight", ".default.weight"): value for name, value in fast.items()}
    with sdpa_kernel(SDPBackend.MATH):
        if next(iter(fast.values())).dtype == torch.float32:
            return functional_call(model, named, (), {**rows.inputs, "labels": rows.labels_BL}).loss
        # transformers rounds logits to float32 when it is given labels
        logits = functional_call(model, named, (), dict(rows.inputs)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.labels_BL[:, 1:].flatten(), ignore_index=-100)


def reference_model(model: PeftModel) -> PeftModel:
    """Ready for `plain_loss`: no dropout, and 8-bit layers in training mode, where they quantise weights only."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def assert_equal(actual: Params, expected: Params, relative: float) -> None:
    """Each tensor of `actual` equals its namesake to `relative`, measured against the largest entries."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-300)
        assert error <= relative, f"{name}: relative error {error:.1e}"


def fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the bytes of every tensor that is not a LoRA matrix, quantisation state included."""
    tensors = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if "lora_" not in n}
    for path, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            tensors |= {f"{path}.absmax": state.absmax, f"{path}.code": state.code}
        for name in ("SCB", "CB"):
            value = getattr(getattr(layer, "weight", None), name, None)
            value = getattr(getattr(layer, "state", None), name, None) if value is None else value
            if value is not None:
                tensors[f"{path}.{name}"] = value

    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()

    return {name: digest(tensor) for name, tensor in tensors.items()}


def enable_checkpointing(base: torch.nn.Module, options: dict) -> Callable[[], bool]:
    """transformers' own activation checkpointing, which older versions call by another name; whether it is on."""
    word = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{word}_checkpointing_enable")(options)
    return lambda: getattr(base, f"is_{word}_checkpointing")
