"""Meta-train a LoRA adapter on many tasks, adapt it to held-out ones, and compare.

    accelerate launch recipes/meta_lora.py --config recipes/configs/locale_formatting.yaml
    accelerate launch recipes/meta_lora.py --train_tasks mine.jsonl --model_name_or_path my/model --load_in_4bit true

``--help`` explains every option; a config file is flat YAML with the same names.
"""

import sys

from meta_peft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
