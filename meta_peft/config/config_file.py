"""Options from a flat YAML file and the command line: ``--config x.yaml --any_key value``."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.utils.checked import each_once, shown

# Options of other trainers that people try here, with the reason why they are not here.
REFUSED = {
    "packing": "packing is refused: a packed row would mix the examples of several tasks. Leave it out.",
    "use_unsloth": "use_unsloth is refused: Unsloth's kernels overwrite activations in backward. Leave it out.",
}

NULL = "null"
YAML_NULL, YAML_TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "str"))


def parse(
    groups: Sequence[type], argv: Sequence[str], *, prog: str | None = None, about: str | None = None
) -> tuple[Any, ...]:
    """One object of each dataclass in `groups`; what the command line says goes before the file.

    ``null`` there is what it is in YAML: the option is as if neither had said anything.

    Raises:
        MetaPeftError: a key that no group has or that the command line has twice, a value of the wrong type, or one that a
            group refuses.
    """
    parser = HfArgumentParser(list(groups), prog=prog, description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", help="A flat YAML file with any of these options.")
    options = [f for group in groups for f in fields(group) if f.init]
    known, kinds = {f.name for f in options}, _kinds(groups)
    for action in parser._actions:  # of an option that is a text or a list of them, HfArgumentParser takes one text
        if action.nargs is None and "list[str]" in kinds.get(action.dest, ""):
            action.nargs = "+"
    path, rest = _config_option(list(argv))
    if any(word.partition("=")[0] == "--config" for word in rest):
        raise MetaPeftError(
            "--config is given twice: name one file, and what is to be otherwise as options, which go before it."
        )
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        sys.exit(0)
    given = [word[2:].split("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
    each_once([f"--{key}" for key in (*given, *([] if path is None else ["config"]))])
    from_file = {} if path is None else _read(path, known, {key for key, kind in kinds.items() if "str" in kind})
    from_line = set(given)
    for key in from_line - known - {f"no_{f.name}" for f in options if f.default is True}:
        raise MetaPeftError(REFUSED.get(key) or f"There is no option --{key}.{did_you_mean(key, known)} Try --help.")
    try:
        words = [word for key, value in from_file.items() if key not in from_line for word in _as_words(key, value)]
    except (ValueError, TypeError, RecursionError) as error:  # JSON that cannot be, an integer of thousands of digits
        raise MetaPeftError(f"{path} has a value that cannot be an option ({error}).") from error
    return _dataclasses(parser, words + _without_nulls(rest))


def _kinds(groups: Sequence[type]) -> dict[str, str]:
    """The types of options as they are written; those of the fields `HfArgumentParser` overwrites."""
    bases = [base for group in groups for base in reversed(group.__mro__)]
    return {name: str(kind) for base in bases for name, kind in inspect.get_annotations(base).items()}


def _dataclasses(parser: HfArgumentParser, words: list[str]) -> tuple[Any, ...]:
    import argparse

    def fail(message: str) -> None:
        raise MetaPeftError(f"{message[0].upper()}{message[1:]}.")

    parser.error = fail  # argparse would exit with its usage
    try:
        return tuple(parser.parse_args_into_dataclasses(args=words, look_for_args_file=False))[
            : len(parser.dataclass_types)
        ]
    except MetaPeftError:
        raise
    except Exception as error:  # a word no option takes; transformers refuses values with errors of many kinds
        said = str(error).rstrip(".") if isinstance(error, (argparse.ArgumentError, ValueError)) else repr(error)
        raise MetaPeftError(f"{said}.") from error


def _without_nulls(words: list[str]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if word == NULL and kept and kept[-1].startswith("--"):
            kept.pop()
        elif not word.startswith("--") or word.partition("=")[2] != NULL:
            kept.append(word)
    return kept


def _config_option(argv: list[str]) -> tuple[str | None, list[str]]:
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise MetaPeftError("--config needs the path of a YAML file.")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


def _read(path: str, known: set[str], texts: set[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise MetaPeftError(f"There is no config file {path!r}.")
    try:
        values = _Strict(Path(path).read_text(encoding="utf-8"), texts).get_single_data() or {}
    except Exception as error:  # a tag such as !!int raises whatever Python makes of its value
        raise MetaPeftError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise MetaPeftError(f"{path} must hold keys with values, one a line; it holds {type(values).__name__}.")
    for key in values:
        if key not in known:
            raise MetaPeftError(
                REFUSED.get(key)
                or f"{path} has an unknown key {shown(key)}.{did_you_mean(key if isinstance(key, str) else '', known)}"
            )
    return values


class _Strict(yaml.SafeLoader):
    """No aliases: a few lines of aliases of aliases stand for more values than any memory holds, and options need none. No
    key twice, of which the last one would count without a word. And the values of `texts` are as they are written, where
    YAML would make false of no (Norwegian, or a strategy), 45045 of 12:30:45 and 1.1 of 1.10."""

    def __init__(self, text: str, texts: set[str]):
        super().__init__(text)
        self._texts = texts

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value in self._texts:
                for node in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(node, yaml.ScalarNode) and node.tag != YAML_NULL:
                        node.tag = YAML_TEXT
        return root

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.YAMLError(f"the key {shown(key)} is there twice")
        return super().construct_mapping(node, deep=deep)


def _as_words(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]  # one word: a value may begin with -
