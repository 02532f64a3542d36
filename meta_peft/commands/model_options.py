"""The options of commands that load an adapter with its base model, and read tasks."""

from __future__ import annotations

import argparse
from typing import Any


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


def load_model(options: argparse.Namespace) -> Any:
    from meta_peft.adapters.hub import load

    return load(
        options.model_name_or_path,
        options.adapter,
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        dtype=options.dtype,
    )
