"""``meta-peft train | adapt | evaluate | inspect | push | tasks``: which command runs, and what its errors become."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from safetensors import SafetensorError

from meta_peft import __version__
from meta_peft.commands import adapt, estimate, evaluate, inspect, push, tasks, train
from meta_peft.commands.options_parser import OptionsParser
from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.utils.allocator import keep_freed_memory

EXAMPLES = """examples:
  meta-peft train --config recipes/configs/locale_formatting.yaml
  meta-peft adapt --adapter outputs/meta_lora --support rows.jsonl --output new
  meta-peft evaluate --adapter outputs/meta_lora --tasks held_out.jsonl

exit codes: 0 done; 2 something given cannot be used (the message says what);
  3 some tasks failed (adapt); 130, 143 stopped by a signal"""

WITH_FEW_OPTIONS = {"adapt": adapt, "evaluate": evaluate, "inspect": inspect, "push": push}
STOPPED = 130  # 128 and the number of SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("meta_peft").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses an optional package at every start
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers by the old name
    if words[:1] != ["train"]:
        keep_freed_memory()
    try:
        return _main(words)
    except (MetaPeftError, OSError, SafetensorError) as error:
        # What was given, or a file that cannot be read or written.
        print(f"meta-peft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("meta-peft: stopped.", file=sys.stderr)
        return STOPPED


def _main(words: list[str]) -> int:
    of_a_run = _of_a_run(words)
    if of_a_run is not None:
        return of_a_run(words[1:])
    parser, commands = command_parsers()
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise MetaPeftError(f"There is no command {words[0]!r}.{did_you_mean(words[0], commands)}")
    options = parser.parse_args(words)
    return WITH_FEW_OPTIONS[options.command].run(options)


def _of_a_run(words: Sequence[str]) -> Callable[[Sequence[str]], int] | None:
    """The command, if it is one that takes the options of a training run."""
    if words[:1] == ["train"]:
        return train.run
    if words[:1] == ["tasks"]:
        return tasks.run
    if words[:1] == ["inspect"] and "--estimate" in words:
        return estimate.run
    with_config = any(word == "--config" or word.startswith("--config=") for word in words)
    return evaluate.compare if words[:1] == ["evaluate"] and with_config else None


def command_parsers() -> tuple[OptionsParser, dict[str, OptionsParser]]:
    """The parser of the whole command line, and those of its commands; `train` and `tasks` read options of their own."""
    parser = OptionsParser(
        prog="meta-peft",
        description="Meta-learn LoRA adapters that adapt to a new task in a few gradient steps.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"meta-peft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,adapt,evaluate,inspect,push,tasks}")
    commands.add_parser("train", help="meta-train an adapter; --config FILE", add_help=False)
    for name, help_line in (
        ("adapt", "adapt to one task, or to each task of a file"),
        ("evaluate", "on held-out tasks; --config: compare starts"),
        ("inspect", "an adapter's contents; --estimate: a run's memory"),
        ("push", "upload a saved adapter to the hub"),
    ):
        module = WITH_FEW_OPTIONS[name]
        usage, about = f"meta-peft {name} {module.USAGE}", {"description": module.ABOUT, "epilog": module.EXAMPLES}
        module.add_options(commands.add_parser(name, help=help_line, usage=usage, **about))
    commands.add_parser("tasks", help="which training tasks help or hurt", add_help=False)
    return parser, dict(commands.choices)


if __name__ == "__main__":
    sys.exit(main())
