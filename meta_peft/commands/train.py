"""``meta-peft train``: the main job."""

from __future__ import annotations

from collections.abc import Sequence

from meta_peft.commands.run_options import run_options, show_help
from meta_peft.utils.allocator import keep_freed_memory

HELP = """usage: meta-peft train --config FILE [--key value ...]
       accelerate launch recipes/meta_lora.py --config FILE [--key value ...]

Meta-train a LoRA adapter, save it, and compare it on held-out tasks. FILE is
flat YAML of the same options; the command line goes before it. Most used:

  --model_name_or_path ID       the base: a hub id or a folder
  --load_in_4bit true           keep it in 4 bits (or --load_in_8bit)
  --train_tasks FILE            rows of the training tasks; also
                                --validation_tasks, --test_tasks
  --task_column NAME            the column that names a row's task (task)
  --prompt_template TEXT        such as "{input} ->"; --completion_template
  --algorithm NAME              maml, fomaml, imaml, reptile or multitask
  --shots N --query_size N      rows of an episode
  --inner_steps N --inner_lr X  the inner loop
  --max_steps N                 outer steps
  --multitask_warmup_steps N    of these, multi-task training at first
  --compare full                also with multi-task LoRA and in-context
  --output_dir DIR              adapter, checkpoints, table and plot
  --resume_from_checkpoint true go on from the last checkpoint

--help_all lists every option, as docs/options.md does.

examples:
  meta-peft train --config recipes/configs/locale_formatting.yaml
  meta-peft train --config mine.yaml --shots 8 --output_dir outputs/mine"""


def run(words: Sequence[str]) -> int:
    """The main job, by config file and options."""
    show_help(words, HELP)
    from meta_peft.main_job import run as main_job
    from meta_peft.processes import group
    from meta_peft.sharding.asked import launched_to_shard

    if not launched_to_shard():  # gathered weights that stay in the heap would be more than a whole base
        keep_freed_memory()
    try:
        main_job(*run_options(words, prog="meta-peft train"))
    finally:
        group.leave()
    return 0
