"""The frozen base model: found, loaded, quantised, and given its adapter."""

from meta_peft.base.base_model import load_base
from meta_peft.base.new_adapter import lora_config, with_adapter
from meta_peft.base.tokenizers import load_tokenizer

__all__ = ["load_base", "load_tokenizer", "lora_config", "with_adapter"]
