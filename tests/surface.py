"""What the tests of the user's side share: a tiny model in a folder, tasks it can learn, and one trained adapter."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from textwrap import indent

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import VOCAB, tiny_base
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meta_peft import MetaLoraConfig, MetaTrainer
from meta_peft.base import load_base, with_adapter
from meta_peft.config import ModelArguments

ROOT = Path(__file__).parents[1]
TRAIN, EVAL, TEST = "abcdefgh", "ijkl", "mnop"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: letters, digits and what the default templates need."""
    words = [*SPECIAL.values(), *"abcdefghijklmnopqrstuvwxyz", *" ->\n:,", "1", "2", "3"]
    words = words[:VOCAB]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@cache
def tiny_folder(seed: int = 0) -> Path:
    """A random two-layer Llama with its tokenizer, saved as `from_pretrained` reads it."""
    folder = temporary_folder() / "base"
    base = tiny_base("llama", torch.float32, layers=2, width=64)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        for parameter in base.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator)
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="meta_peft_test_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def letter_rows(letter: str, n: int = 8) -> list[dict[str, str]]:
    """The task of one letter: whatever the three letters of the input are, answer with this one, twice."""
    rng = np.random.default_rng(ord(letter))
    words = {"".join(rng.choice(list("abcdefghijklmnop"), 3)) for _ in range(4 * n)}
    return [{"input": word, "target": 2 * letter} for word in sorted(words)[:n]]


def letter_tasks(letters: str, n: int = 8) -> dict[str, list[dict[str, str]]]:
    return {f"say {letter}": letter_rows(letter, n) for letter in letters}


def write_jsonl(path: Path, tasks: dict[str, list[dict[str, str]]], column: str = "task") -> Path:
    rows = [{column: name, **row} for name, rows in tasks.items() for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lora(**options) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]} | options
    return LoraConfig(task_type="CAUSAL_LM", **options)


def base_model(kind: str = "dense", folder: Path | None = None) -> torch.nn.Module:
    """The model in `folder`, by default of `tiny_folder`: dense, 4-bit or 8-bit."""
    where = str(folder or tiny_folder())
    return load_base(ModelArguments(where, load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit"))


def peft_model(kind: str = "dense", **options) -> PeftModel:
    base = base_model(kind)
    torch.manual_seed(0)  # LoRA A matrices start at random
    return with_adapter(base, lora(**options))


def config(output: Path, **options) -> MetaLoraConfig:
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "inner_steps": 1,
        "inner_lr": 0.02,
        "learning_rate": 0.02,
        "inner_lr_learning_rate": 0.02,
        "shots": 2,
        "query_size": 2,
        "max_length": 32,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MetaLoraConfig(output_dir=str(output), **defaults | options)


def trainer(output: Path, *, model=None, tasks=None, eval_tasks=None, callbacks=None, **options) -> MetaTrainer:
    tasks = letter_tasks(TRAIN) if tasks is None else tasks
    return MetaTrainer(
        peft_model() if model is None else model,
        config(output, **options),
        train_dataset=tasks,
        eval_dataset=eval_tasks,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


@cache
def trained_folder() -> Path:
    """A meta-learned adapter of the model in `tiny_folder`, as `MetaTrainer.save_model` writes it."""
    folder = temporary_folder() / "meta"
    run = trainer(folder, max_steps=20, per_device_train_batch_size=4, inner_steps=3, query_size=4, learning_rate=0.01)
    run.train()
    run.save_model()
    return folder


def environment(**extra: str) -> dict[str, str]:
    """For processes of their own: this checkout's package, no hub, one thread, no compiler.

    bitsandbytes asks for compiled functions when it is imported, which loads a compiler that nothing here uses: a quarter
    of what a process takes to start.
    """
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    own |= {"TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **own, **extra}


def run_python(code: str, *arguments: str, **extra: str) -> str:
    """Run `code` in a new process and return what it prints; its error output is in the failure's message."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**extra), check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


# On CPUs with AVX512-BF16 instructions the first forward of a 4-bit layer without gradients repacks its weight, which
# rounds it. meta_peft switches that off in a model it is given; a process without meta_peft has to do so itself to
# compute the same bits.
NOT_REPACKED = """
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
"""
LOGITS = """
ids = torch.arange(3, 35).view(2, 16)
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits
"""
STOCK_LOGITS = f"""
import sys
sys.modules["meta_peft"] = None  # an import would fail
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, output, *adapters = sys.argv[1:]
found = dict()
for i, kind in enumerate(adapters[::2]):
    options = dict(dtype=torch.float32)
    if kind == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    if kind == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), adapters[2 * i + 1])
{indent(NOT_REPACKED + LOGITS, "    ")}
    found[kind] = logits
save_file(found, output)
try:
    import meta_peft
except ImportError:
    sys.exit(0)
sys.exit("meta_peft was imported")
"""


def logits_of_stock_peft(adapters: dict[str, Path], output: Path) -> dict[str, torch.Tensor]:
    """Logits of the adapter in each folder on the base of its kind, from a process that has no meta_peft."""
    run_python(STOCK_LOGITS, str(tiny_folder()), str(output), *(str(w) for pair in adapters.items() for w in pair))
    return load_file(output)


def stock_logits(model: torch.nn.Module) -> torch.Tensor:
    """What an ordinary forward of `model` gives in this process; the model stays in its mode."""
    training, values = model.training, {"model": model, "torch": torch}
    exec(NOT_REPACKED + LOGITS, values)
    model.train(training)
    return values["logits"]
