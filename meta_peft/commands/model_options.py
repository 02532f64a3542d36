"""The options of commands that load an adapter with its base model, and read tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meta_peft.adapters.sidecar import Sidecar


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR_OR_ID", help="a meta-learned adapter")
    parser.add_argument("--model-name-or-path", metavar="ID", help="the base (the one the adapter names)")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the base to 4 bits")
    parser.add_argument("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="of the base: float32 or bfloat16 (float32)")


def add_empty_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--empty-rows", default="error", metavar="HOW", help="with nothing in them: error or leave_out (error)"
    )


def read_adapter(options: argparse.Namespace) -> tuple[Path, Sidecar]:
    """The folder of the adapter, fetched if it is on the hub, and its sidecar: without the base, so that it is quick."""
    from meta_peft.adapters.hub import fetch
    from meta_peft.adapters.sidecar import Sidecar

    folder = fetch(options.adapter)
    return folder, Sidecar.read(folder)


def load_model(options: argparse.Namespace, folder: Path) -> Any:
    """The base with the adapter in `folder`."""
    from meta_peft.adapters.hub import load

    return load(
        options.model_name_or_path,
        folder,
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        dtype=options.dtype,
    )
