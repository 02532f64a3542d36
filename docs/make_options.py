"""Write docs/options.md from the options' own help: python docs/make_options.py"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from meta_peft import cli
from meta_peft.comparison.compare import CompareArguments
from meta_peft.comparison.task_report import TaskReportArguments
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.estimate.estimate import EstimateArguments
from meta_peft.protocol import ProtocolArguments

PAGE = Path(__file__).with_name("options.md")
COMMANDS = {
    "adapt": "Adapt to one task, or to each task of a file.",
    "evaluate": "Query loss and a metric on held-out tasks.",
    "inspect": "What is in an adapter folder.",
    "push": "A saved adapter to the hub.",
}
GROUPS = {
    ModelArguments: "The base model, its precision and where LoRA goes",
    TaskArguments: "Where the tasks come from",
    MetaLoraConfig: "Meta-training",
    CompareArguments: "The comparison on held-out tasks",
}
ABOUT = """# Options

This page is made by `python docs/make_options.py` from the help texts of the options. Change those, not this page.

`meta-peft train` and `accelerate launch recipes/meta_lora.py` take every option of the next four tables, on the command
line as `--key value`, or in a flat YAML file given by `--config`. The command line goes before the file, and `--key null`
there takes back what the file says. In Python they are the fields of four dataclasses. An unknown key is an error that
names the closest known one.
"""
ESTIMATE = "Where the memory of a run goes. It takes every option of `train`, and these:"
COMPARE = (
    "Which start is best, see [evaluation](evaluation.md#the-whole-comparison). Every option of `train`, and these:"
)
TASKS = "Which tasks help and which hurt, see [choosing](choosing.md). It takes every option of `train`, and these:"
INHERITED = """### What is inherited

`MetaLoraConfig` is a `transformers.TrainingArguments`, so its options work too. These are the ones most often set here:

| option | what |
| --- | --- |
| `seed` | Which episodes are drawn, and where LoRA starts. |
| `lr_scheduler_type`, `warmup_steps` | The schedule of both outer learning rates. |
| `weight_decay`, `max_grad_norm` | Of the LoRA initialisation; learned rates are clipped apart and never decayed. |
| `gradient_checkpointing` | Compute activations again in backward instead of keeping them; exact, in second order too. |
| `gradient_accumulation_steps` | Batches of tasks per outer step. |
| `save_strategy`, `save_steps`, `resume_from_checkpoint` | Checkpoints, and going on from one. |
| `eval_strategy`, `eval_steps` | Evaluation on the validation tasks during training. |
| `report_to`, `run_name` | Trackers, such as tensorboard, trackio or wandb. |
| `push_to_hub`, `hub_model_id` | Push the adapter to the hub. |
| `use_cpu` | Stay on the CPU where there is a GPU. |

`fp16`, `bf16`, `bf16_full_eval`, `fp16_full_eval`, `num_train_epochs`, `data_seed`, `train_sampling_strategy`,
`label_smoothing_factor`, `neftune_noise_alpha`, `include_num_input_tokens_seen`, `torch_compile`, `use_liger_kernel`,
`remove_unused_columns`, `fsdp` and `deepspeed` are refused, and so is an `optim` that follows a backward pass (GaLore,
APOLLO, LOMO): see [limits](limits.md).
"""


def page() -> str:
    """The whole page."""
    parts = [ABOUT]
    for group, title in GROUPS.items():
        rows = [(f"`{f.name}`", _default(f), f.metadata["help"]) for f in own_fields(group)]
        parts.append(f"## {title}\n\n`{group.__name__}`\n\n{_table(rows)}")
        if group is MetaLoraConfig:
            parts.append(INHERITED)
    for command, about in COMMANDS.items():
        rows = [(f"`{names}`", default, text) for names, default, text in command_options(command)]
        parts.append(f"## meta-peft {command}\n\n{about}\n\n{_table(rows)}")
    for group, title, about in (
        (ProtocolArguments, "meta-peft evaluate --config", COMPARE),
        (EstimateArguments, "meta-peft inspect --estimate", ESTIMATE),
        (TaskReportArguments, "meta-peft tasks", TASKS),
    ):
        rows = [(f"`{f.name}`", _default(f), f.metadata["help"]) for f in own_fields(group)]
        parts.append(f"## {title}\n\n{about}\n\n{_table(rows)}")
    return "\n".join(parts)


def own_fields(group: type) -> list[Field[Any]]:
    """The fields that `group` itself declares, without those it inherits."""
    return [f for f in fields(group) if f.name in group.__annotations__ and f.init]


def command_options(command: str) -> Iterator[tuple[str, str, str]]:
    """Option, default and help of each option of a `meta-peft` command."""
    for action in cli.command_parsers()[1][command]._actions:
        if not isinstance(action, argparse._HelpAction):
            default = "required" if action.required else _value(action.default)
            yield ", ".join(action.option_strings), default, str(action.help)


def _default(f: Field[Any]) -> str:
    return _value(f.default if f.default is not MISSING else f.default_factory())  # type: ignore[misc]


def _value(value: Any) -> str:
    if value is None or value is False:
        return "" if value is None else "`false`"
    if value is True:
        return "`true`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| option | default | what |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
