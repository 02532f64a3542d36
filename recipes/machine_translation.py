"""Translate short texts into a language that no training task had.

    python recipes/data/machine_translation.py
    accelerate launch recipes/machine_translation.py

The options are in recipes/configs/machine_translation.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "machine_translation.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
