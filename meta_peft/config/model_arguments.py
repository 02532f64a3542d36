"""The options of the base model."""

from __future__ import annotations

from dataclasses import dataclass, field

from meta_peft.errors import MetaPeftError
from meta_peft.objectives import OBJECTIVES
from meta_peft.tasks.encoding.facts import MOST_CLASSES
from meta_peft.utils.checked import at_least, is_number, one_of, shown, whole

DEFAULT_TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


@dataclass
class ModelArguments:
    """The base model, its precision and where LoRA goes."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Base model: a hub id or a local folder."}
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "What the model is for: causal_lm, seq2seq_lm, speech_seq2seq, masked_lm, sequence_classification or"
            " token_classification. By default what its config says it is made for."
        },
    )
    num_labels: int | None = field(
        default=None,
        metadata={
            "help": "Classes of a classification head. By default the base's, or if it has no such head, the most that a"
            " task has."
        },
    )
    new_head: str = field(
        default="zero",
        metadata={
            "help": "Where a classification head starts that the base has not: zero (all classes alike), or random, as"
            " transformers makes it."
        },
    )
    speech_language: str | None = field(
        default=None, metadata={"help": "Language that a speech model is told to write, such as spanish."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the base model."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the base: float32 or bfloat16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bits with bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to 8 bits with bitsandbytes."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit data type: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales too."})
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "How 4-bit codes are stored: uint8, float32 or bfloat16. By default as dtype where FSDP2 shards the"
            " base, which it could not do with uint8, else uint8."
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "For one process: auto, or a JSON file from module names to cpu, disk or a device number. What does"
            " not fit the device is fetched when it is used."
        },
    )
    offload_folder: str | None = field(default=None, metadata={"help": "Where device_map puts what goes to disk."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base, such as sdpa or eager; transformers' choice by default."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale: updates are multiplied by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Kept in the adapter's config; the inner loop uses none."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={
            "help": "Names of the linear layers that get LoRA; all-linear for all. The base must have each that"
            " is given, and some of the default ones."
        },
    )
    lora_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of the layers that get LoRA, counted from 0; all by default. With the upper ones alone a"
            " step is cheaper: what lies below runs once, not at each inner step."
        },
    )

    def __post_init__(self) -> None:
        if self.objective is not None:
            one_of("objective", self.objective, tuple(OBJECTIVES))
        if self.num_labels is not None:
            whole("num_labels", self.num_labels, 2, MOST_CLASSES)
        one_of("new_head", self.new_head, ("zero", "random"))
        one_of("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4"))
        if self.dtype == "float16":
            raise MetaPeftError(
                "dtype=float16 is refused: gradient scaling does not reach the inner loop, so small gradients would be"
                " lost. Use bfloat16 or float32."
            )
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        if self.bnb_4bit_quant_storage is not None:
            one_of("bnb_4bit_quant_storage", self.bnb_4bit_quant_storage, ("uint8", "float32", "bfloat16"))
        if self.load_in_4bit and self.load_in_8bit:
            raise MetaPeftError("load_in_4bit and load_in_8bit are both set: choose one.")
        at_least("lora_r", self.lora_r, 1)
        if not (is_number(self.lora_alpha) and self.lora_alpha > 0):
            raise MetaPeftError(
                f"lora_alpha must be a number above 0, since LoRA is multiplied by it; got {shown(self.lora_alpha)}."
            )
        if not 0 <= self.lora_dropout <= 1:
            raise MetaPeftError(f"lora_dropout must be a number from 0 to 1; got {self.lora_dropout}.")
        if self.lora_target_modules in ("all-linear", ["all-linear"]):
            self.lora_target_modules = "all-linear"  # type: ignore[assignment]  # what PEFT understands
            if self.lora_layers is not None:
                raise MetaPeftError(
                    "lora_target_modules=all-linear is for all layers, and lora_layers chooses some: name the linear layers"
                    " that are to get LoRA there, or leave lora_layers out."
                )

    @property
    def quantisation(self) -> str:
        """How the base is stored, as the table of what shards calls it."""
        return "4-bit" if self.load_in_4bit else "8-bit" if self.load_in_8bit else self.dtype
