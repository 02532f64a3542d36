"""Rewrite dates, names, e-mail addresses and other texts as a few examples show.

    python recipes/data/data_wrangling.py
    accelerate launch recipes/data_wrangling.py

The options are in recipes/configs/data_wrangling.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "data_wrangling.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
