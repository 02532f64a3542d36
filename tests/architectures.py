"""A tiny random model of each architecture, in float64 throughout, and rows for it."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB, random_rows
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from meta_peft.lora.fast_weights import FastWeights
from meta_peft.types import EpisodeBatch, Params, Rows

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}
GROUPED = {**SIZES, "num_key_value_heads": 1}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "experts_implementation": "eager"}  # grouped_mm has no float64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """How to build one: sizes under the config's own names, and the linear layers that LoRA goes to."""

    sizes: dict[str, Any]
    targets: tuple[str, ...]
    loaded_with: Any = AutoModelForCausalLM
    layers: tuple[str, ...] = ("num_hidden_layers",)
    special: dict[str, int] = field(default_factory=dict)

    @property
    def shift(self) -> int:
        """How far before its label a logit stands."""
        return int(self.loaded_with is AutoModelForCausalLM)


ARCHITECTURES = {
    "llama": Architecture({**GROUPED, "head_dim": 8}, LLAMA),
    "mistral": Architecture({**GROUPED, "head_dim": 8, "sliding_window": 3}, LLAMA),
    "qwen2": Architecture({**GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, LLAMA),
    "qwen3": Architecture({**GROUPED, "head_dim": 8}, LLAMA),
    "gemma": Architecture({**GROUPED, "head_dim": 8}, LLAMA),
    # Sliding and global attention by turns; soft caps small enough to bend attention scores and logits.
    "gemma2": Architecture(
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 3,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 2.0,
        },
        LLAMA,
    ),
    "gemma3_text": Architecture(
        {**GROUPED, "head_dim": 8, "sliding_window": 3, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}, LLAMA
    ),
    "phi": Architecture(SIZES, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "phi3": Architecture({**GROUPED, "sliding_window": 3}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": Architecture(
        {"n_embd": 16, "n_head": 2, "n_positions": 32}, ("c_attn", "c_proj", "c_fc"), layers=("n_layer",)
    ),
    "gpt_neox": Architecture(SIZES, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    # Embeddings narrower than the layers, as in OPT-350m: a projection before the layers and one before the head.
    "opt": Architecture(
        {
            "hidden_size": 16,
            "ffn_dim": 16,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 8,
            "layerdrop": 0.5,
        },
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "mixtral": Architecture({**EXPERTS, "num_local_experts": 4, "head_dim": 8}, ATTENTION),
    "qwen2_moe": Architecture(
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}, ATTENTION
    ),
    "qwen3_moe": Architecture(
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "norm_topk_prob": True}, ATTENTION
    ),
    "olmoe": Architecture({**EXPERTS, "num_experts": 4}, ATTENTION),
    "bert": Architecture(SIZES, ("query", "key", "value", "dense"), AutoModelForMaskedLM),
    "roberta": Architecture(SIZES, ("query", "key", "value", "dense"), AutoModelForMaskedLM),
    "distilbert": Architecture(
        {"dim": 16, "hidden_dim": 16, "n_heads": 2, "max_position_embeddings": 32},
        ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        AutoModelForMaskedLM,
        ("n_layers",),
    ),
    "t5": Architecture(
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2},
        ("q", "k", "v", "o", "wi", "wo"),
        AutoModelForSeq2SeqLM,
        ("num_layers", "num_decoder_layers"),
        {"decoder_start_token_id": 2},
    ),
    "whisper": Architecture(
        {
            "d_model": 16,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_mel_bins": 4,
            "max_source_positions": 6,
            "max_target_positions": 16,
            # Everything random that training has: it must be off.
            "dropout": 0.3,
            "encoder_layerdrop": 0.5,
            "decoder_layerdrop": 0.5,
            "apply_spec_augment": True,
            "mask_time_prob": 0.5,
            "mask_time_length": 2,
            "mask_feature_prob": 0.5,
            "mask_feature_length": 2,
        },
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        AutoModelForSpeechSeq2Seq,
        ("encoder_layers", "decoder_layers"),
        {"decoder_start_token_id": 3},
    ),
}


def base_of(kind: str, *, layers: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """A random model whose every parameter matters, norms and biases included."""
    how = ARCHITECTURES[kind]
    sizes = how.sizes | how.special | dict.fromkeys(how.layers, layers) | options
    experts = sizes.pop("experts_implementation", None)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **(special | sizes))
    if experts:
        config._experts_implementation = experts
    torch.manual_seed(0)
    model = how.loaded_with.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.data = (0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise).to(dtype)
    if dtype == torch.float64:
        in_float64(model)
    return model


def in_float64(model: PreTrainedModel) -> None:
    """Replace what `transformers` rounds to float32 inside by the same formula in the precision of its input."""
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or kind == "T5LayerNorm":
            twin: nn.Module = nn.RMSNorm(len(module.weight), getattr(module, "variance_epsilon", None) or module.eps)
            weight = module.weight + 1 if "Gemma" in kind else module.weight
        elif kind.endswith("TopKRouter"):
            twin, weight = ExactRouter(module), module.weight
        else:
            continue
        twin.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, twin)
    if model.config._attn_implementation == "eager":
        model.set_attn_implementation("eager_float64")


class ExactRouter(nn.Module):
    """The routers of Mixtral, Qwen and OLMoE."""

    def __init__(self, router: Any):
        super().__init__()
        self.top_k, self.normalise = router.top_k, getattr(router, "norm_topk_prob", True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        scores, indices = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True) if self.normalise else scores, indices


def _eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Gemma 2's, the one architecture here that `transformers` runs eagerly, without rounding the softmax."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = kwargs["softcap"] * (scores / kwargs["softcap"]).tanh()
    weights = (scores + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("eager_float64", _eager_attention)
AttentionMaskInterface.register("eager_float64", eager_mask)


def lora(base: PreTrainedModel, targets: Any, *, rank: int = 2, **options: Any) -> PeftModel:
    """`base` with a LoRA adapter of which no matrix is zero."""
    if not isinstance(targets, str):
        targets = list(targets)
    options = {"fan_in_fan_out": base.config.model_type == "gpt2", "lora_alpha": 4} | options
    with warnings.catch_warnings():
        # PEFT adapts the embedding alone where it shares its weight with the head, and so does `plain_loss`.
        warnings.filterwarnings(
            "ignore", "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
        )
        model = get_peft_model(base, LoraConfig(target_modules=targets, r=rank, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in FastWeights(model).parameters().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        start = parameter if parameter.dim() == 1 else 0  # the magnitudes of DoRA
        parameter.data = (start + 0.2 * noise).to(parameter.dtype)
    return model


def rows_for(base: PreTrainedModel, n_tasks: int = 2, per_task: int = 2, *, seed: int = 0, pad: str = "right") -> Rows:
    """Rows as the architecture wants them, with padding and unequal numbers of labels."""
    config = base.config
    rows = random_rows(n_tasks, per_task, seed=seed, pad=pad)
    if config.is_encoder_decoder:
        labels = rows.labels_BL
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        given = {"decoder_input_ids": shifted.masked_fill(shifted == -100, config.pad_token_id)}
        if config.model_type == "whisper":
            shape = (len(labels), config.num_mel_bins, 2 * config.max_source_positions)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            return Rows({"input_features": noise.to(base.dtype), **given}, labels, n_tasks)
        source = random_rows(n_tasks, per_task, length=5, seed=seed + 100, pad=pad)
        return Rows({**source.inputs, **given}, labels, n_tasks)
    if ARCHITECTURES[config.model_type].shift == 0:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand(rows.labels_BL.shape, generator=generator) < 0.6
        hidden[:, 1] = True  # no row without a label
        ids = rows.inputs["input_ids"].masked_fill(hidden & (rows.inputs["attention_mask"] == 1), 3)
        labels = torch.where(ids == 3, rows.inputs["input_ids"], -100)
        return Rows({**rows.inputs, "input_ids": ids}, labels, n_tasks)
    return rows


def batch_for(base: PreTrainedModel, n_tasks: int = 2, *, pad: str = "right") -> EpisodeBatch:
    support, query = rows_for(base, n_tasks, 2, seed=2, pad=pad), rows_for(base, n_tasks, 1, seed=3, pad=pad)
    return EpisodeBatch(support, query, [f"task {t}" for t in range(n_tasks)])


def plain_loss(model: PeftModel, fast: Params, rows: Rows) -> Tensor:
    """The loss of one task the ordinary way: PEFT's own forward, all logits, no stack. `fast` is ``[out, in]``."""
    shift = ARCHITECTURES[model.get_base_model().config.model_type].shift
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any("magnitude" in name for name in fast):
            stack.enter_context(model.disable_adapter())
            values = dora_weights(model, fast)
        else:
            adapter = FastWeights(model).adapter
            values = {
                f"{name.removesuffix('.weight')}.{adapter}{'.weight' if name.endswith('.weight') else ''}": value
                for name, value in fast.items()
            }
        logits = functional_call(model, values, (), dict(rows.inputs)).logits
    labels = rows.labels_BL[:, shift:]
    return F.cross_entropy(logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten(), ignore_index=-100)


def dora_weights(model: PeftModel, fast: Params) -> Params:
    """The adapted weights written out, ``m (W + s B A) / |W + s B A|``: PEFT's forward has no derivative of it."""
    weights = {}
    for name, magnitude in fast.items():
        path, _, kind = name.rpartition(".")
        if kind != "lora_magnitude_vector":
            continue
        layer = model.get_submodule(path)
        (scaling,) = layer.scaling.values()
        own = layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight
        adapted = own + scaling * fast[f"{path}.lora_B.weight"] @ fast[f"{path}.lora_A.weight"]
        adapted = magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
        weights[f"{path}.base_layer.weight"] = adapted.T if layer.fan_in_fan_out else adapted
    return weights
