"""Sort definitions of words into four classes that no training task had, with an encoder.

    python recipes/data/text_classification.py
    accelerate launch recipes/encoder_classification.py

The options are in recipes/configs/encoder_classification.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "encoder_classification.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
