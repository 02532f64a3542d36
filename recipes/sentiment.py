"""Tell positive from negative texts of a domain that no training task had.

    python recipes/data/sentiment.py
    accelerate launch recipes/sentiment.py

The options are in recipes/configs/sentiment.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "sentiment.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
