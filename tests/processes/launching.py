"""Start a script in several processes that talk over gloo, as `torchrun` does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from surface import ROOT, environment

TESTS = ROOT / "tests"


def command(processes: int, script: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    if processes == 1 and not launcher:
        return [sys.executable, str(script), *arguments]
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *launcher,
    ]
    return [*words, str(script), *arguments]


def several_environment(**extra: str) -> dict[str, str]:
    return environment(ACCELERATE_USE_CPU="true", PYTHONPATH=f"{ROOT}:{TESTS}", **extra)


def launch(processes: int, script: Path, *arguments: str, launcher: tuple[str, ...] = (), timeout: float = 300):
    """Run to the end; the result has `returncode`, `stdout` and `stderr`."""
    words = command(processes, script, *arguments, launcher=launcher)
    return subprocess.run(
        words, env=several_environment(), capture_output=True, text=True, check=False, timeout=timeout
    )
