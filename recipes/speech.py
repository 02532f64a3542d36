"""Transcribe speech in a language that no training task had.

    python recipes/data/speech.py
    accelerate launch recipes/speech.py

The options are in recipes/configs/speech.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "speech.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
