"""Start a script that makes the processes of its jobs itself, by forking, so that they import everything once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from surface import ROOT, environment


def launch(script: Path, folder: Path) -> str:
    """Run it to its end; the result is what it prints."""
    own = environment(ACCELERATE_USE_CPU="true", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    words = [sys.executable, str(script), str(folder)]
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
