"""Imports run one way: a room may import rooms of a lower rank only, and other libraries only where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import meta_peft

PACKAGE = Path(meta_peft.__file__).parent
# Each module or subfolder of the package, from the ground up.
FLOORS = [
    ["errors", "types"],
    [
        "checked",
        "digests",
        "packages",
        "patterns",
        "params",
        "forwards",
        "task_rows",
        "allocator",
        "known_shapes",
        "checkpointing",
        "memory",
        "whole_weights",
        "metrics",
        "data_wait",
        "atomic_files",
        "hub_errors",
        "padding",
        "rotary_length",
    ],
    [
        "base_identity",
        "tokenizer_identity",
        "live_memory",
        "config_file",
        "fast_weights",
        "frozen_linear",
        "frozen_cache",
        "frozen_prefix",
        "gradient_sketch",
        "rate_map",
        "inner_optimizers",
        "shelf",
        "registry_models",
    ],
    ["survival", "processes", "ops", "preflight", "dora", "slow_prefix", "hessian", "whole_head", "shared_prompt"],
    ["inner_loop"],
    ["objectives", "fast_forwards", "fast_attention", "inner_path", "health", "checkpointed_trainer"],
    ["tasks", "adapter_loss", "algorithms", "model_kinds"],
    ["memory_plan", "schedule", "base_view", "predictions"],
    ["sharding", "scoring"],
    ["outer_loop", "config"],
    ["evaluate", "in_context", "base_model", "outer_step", "task_loading", "equal_compute", "about_run"],
    ["sidecar", "report", "adapter_files", "weightless", "tracking"],
    ["hub", "card", "estimate", "run_log"],
    ["adapt_stacks", "adapter_record", "estimate_report", "support", "pushing_trainer"],
    ["adaptation", "folder_of_adapters"],
    ["run_episodes"],
    ["trainer"],
    ["early_stops"],
    ["compare"],
    ["main_job", "protocol"],
    ["task_report"],
    ["commands"],
    ["cli"],
    ["__init__"],
]
ROOMS = {room: rank for rank, floor in enumerate(FLOORS) for room in floor}
PEFT = "fast_weights fast_forwards ops preflight dora adapter_files adapter_loss outer_loop hub base_model adaptation"
PEFT += " adapt_stacks folder_of_adapters trainer compare protocol main_job weightless"
ONLY_IN = {
    "peft": [
        *PEFT.split(),
        "adapt_stacks",
        "folder_of_adapters",
        "trainer",
        "compare",
        "protocol",
        "main_job",
        "weightless",
    ],
    "bitsandbytes": ["frozen_linear", "preflight"],
    "datasets": ["tasks", "task_loading", "trainer", "commands"],
    "transformers.Trainer": ["checkpointed_trainer"],
}
# In these folders every file is one choice among several, and `rule` and `__init__` know the choices.
INDEPENDENT = {"inner_optimizers": ["__init__", "rule"], "algorithms": ["__init__"]}


def imports_of(path: Path) -> set[str]:
    """Dotted names; `from a import b` gives both ``a`` and ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path: Path):
    room, *inner = path.relative_to(PACKAGE).with_suffix("").parts
    assert room in ROOMS, f"{room} is new: add it to FLOORS in {__file__}, above every room that it imports"
    for name in sorted(imports_of(path)):
        top, *rest = name.split(".")
        if top == "meta_peft" and rest and rest[0] in ROOMS:
            if rest[0] != room:
                assert ROOMS[rest[0]] < ROOMS[room], f"{room} must not import {rest[0]}, which is no lower room"
            elif room in INDEPENDENT and inner[0] not in INDEPENDENT[room]:
                raise AssertionError(f"{room}/{inner[0]} must not import a file beside it ({name})")
        for library, rooms in ONLY_IN.items():
            used = name == library or name.startswith(f"{library}.")
            assert not used or room in rooms, f"{library} belongs in {rooms}, and {path.name} imports {name}"
