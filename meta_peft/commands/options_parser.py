"""The parser of commands with a few options: one screen of help, and an unknown option names the closest known one,
and none is given twice."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.utils.checked import each_once


class OptionsParser(argparse.ArgumentParser):
    """Errors are `MetaPeftError`; options may be written with ``_`` for ``-``, as those of `train` are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _formatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(args if self._subparsers else self._known(args), namespace)

    def _known(self, words: Sequence[str]) -> list[str]:
        found, names = [], []
        for word in words:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
                if name not in self._option_string_actions:
                    raise MetaPeftError(
                        f"There is no option {name}.{did_you_mean(name, self._option_string_actions)} Try --help."
                    )
                names.append(name)
            found.append(f"{name}{equals}{value}")
        each_once(names)
        return found

    def error(self, message: str) -> NoReturn:
        """argparse would exit with its usage."""
        raise MetaPeftError(f"{message[0].upper()}{message[1:]}; {self.prog} --help shows what there is.")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=80)
