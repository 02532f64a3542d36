"""Answer questions about a relation that no training task asked for.

    python recipes/data/question_answering.py
    accelerate launch recipes/question_answering.py

The options are in recipes/configs/question_answering.yaml, and each can be given here too; docs/recipes.md tells more.
"""

import sys
from pathlib import Path

from meta_peft.cli import main

CONFIG = Path(__file__).parent / "configs" / "question_answering.yaml"

if __name__ == "__main__":
    sys.exit(main(["train", "--config", str(CONFIG), *sys.argv[1:]]))
