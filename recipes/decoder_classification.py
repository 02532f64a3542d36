"""Sort texts into classes that no training task had, with a decoder under a head that alone adapts.

    python recipes/data/text_classification.py
    accelerate launch recipes/decoder_classification.py

The options are in recipes/configs/decoder_classification.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "decoder_classification.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
