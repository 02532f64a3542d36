"""Models that Python packages carry, for machines that reach a package registry but no model hub."""

from meta_peft.base.registry_models.minilm import MINILM
from meta_peft.base.registry_models.registry_model import RegistryModel
from meta_peft.base.registry_models.smollm2 import SMOLLM2
from meta_peft.base.registry_models.whisper_tiny_en import WHISPER_TINY_EN

REGISTRY_MODELS = {model.hub_id: model for model in (SMOLLM2, MINILM, WHISPER_TINY_EN)}

__all__ = ["REGISTRY_MODELS", "RegistryModel"]
