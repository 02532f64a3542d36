"""Imports run one way: a room may import rooms of a lower rank only, and other libraries only where they belong."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import meta_peft

PACKAGE = Path(meta_peft.__file__).parent
# Each module or subfolder of the package, from the ground up.
FLOORS = [
    ["errors", "types"],
    ["params", "utils"],
    ["frozen", "inner_optimizers", "processes", "survival"],
    ["lora", "ops"],
    ["objectives", "preflight"],
    ["functional", "tasks"],
    ["inner_loop"],
    ["algorithms", "evaluation"],
    ["outer_loop"],
    ["sharding"],
    ["config"],
    ["base"],
    ["adapters", "estimate"],
    ["adaptation", "run_tasks"],
    ["training"],
    ["comparison"],
    ["main_job", "protocol"],
    ["commands"],
    ["cli"],
    ["__init__"],
]
ROOMS = {room: rank for rank, floor in enumerate(FLOORS) for room in floor}
PEFT = "lora.fast_weights lora.dora ops preflight functional.fast_forwards functional.adapter_loss"
PEFT += " outer_loop.outer_loop base.new_adapter adapters.adapter_files adapters.hub adaptation estimate.weightless"
PEFT += " training.trainer comparison.compare protocol main_job"
ONLY_IN = {  # a library, and the rooms or the files of a room that may import it
    "peft": PEFT.split(),
    "bitsandbytes": ["frozen.linear", "preflight"],
    "datasets": ["tasks", "run_tasks.task_loading", "training.trainer", "commands"],
    "transformers.Trainer": ["training.checkpointed_trainer"],
}
# In these folders every file is one choice among several, and `rule` and `__init__` know the choices.
INDEPENDENT = {"inner_optimizers": ["__init__", "rule"], "algorithms": ["__init__"]}


def imports_of(path: Path, *, run: bool = False) -> set[str]:
    """Dotted names; `from a import b` gives ``a.b``. With `run`, without those that are for type checkers alone."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if run:
        tree.body = [
            node for node in tree.body if not isinstance(node, ast.If) or ast.unparse(node.test) != "TYPE_CHECKING"
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
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
            assert not used or {room, ".".join([room, *inner])} & set(rooms), (
                f"{library} belongs in {rooms}, and {path.name} imports {name}"
            )


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_file_imports_one_that_imports_it():
    """Nor one that imports one that does, inside a room as well."""
    files = {module(path): path for path in PACKAGE.rglob("*.py")}
    imported = {}
    for name, path in files.items():
        found = {other if other in files else other.rpartition(".")[0] for other in imports_of(path, run=True)}
        imported[name] = found & files.keys() - {name}
    TopologicalSorter(imported).prepare()  # raises if there is a circle
