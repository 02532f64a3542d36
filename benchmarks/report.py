"""What a benchmark program writes: a table for people, and JSON that says how its numbers were made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peers

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")


def run_facts(threads: int) -> dict[str, Any]:
    """Versions, machine, commit and command."""
    import meta_peft

    program = Path(sys.argv[0]).resolve()
    shown = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name
    return {
        "command": shlex.join(["python", shown, *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {"meta_peft": meta_peft.__version__} | {name: _version(name) for name in PACKAGES},
        "peers": dict(peers.VERSIONS),
        "threads": threads,
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
    }


def write_json(values: dict[str, Any], path: Path | None) -> None:
    """Write `values`; the file is whole or what it was before."""
    if path is not None:
        write_text(json.dumps(values, indent=2), path)


def write_text(text: str, path: Path) -> None:
    """Write `text` with a line end; the file is whole or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{text}\n", encoding="utf-8")
    os.replace(partial, path)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; numbers to three digits."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with the smallest and the largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def shown(ratio: dict[str, Any] | None) -> str:
    """A `spread` in a cell."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def gib(n_bytes: float | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / (1 << 30):.3g}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
