"""Was a launch understood? Some start fewer processes than were asked for, or several that do not know of each other.

Both end with exit code 0 and a result that is not what was asked for, so they are refused before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from meta_peft.errors import MetaPeftError

WORKING = (
    "On GPUs use `accelerate launch --multi_gpu --num_processes N ...`; on CPUs `ACCELERATE_USE_CPU=true accelerate launch"
    " --multi_gpu --num_processes N --main_process_port 0 ...`, or `ACCELERATE_USE_CPU=true torchrun --standalone"
    " --nproc_per_node N ...`."
)


def check_launch(processes: int) -> None:
    """Raise `MetaPeftError` if `processes`, those that work together, are not as many as the launcher was told to start."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise MetaPeftError(
            f"{started} processes were started, but they form groups of {processes}: each would train on its own, and write"
            f" over the others' results. {WORKING}"
        )
    asked = _asked_of_accelerate(_words_of_parent())
    if asked is not None and asked != processes:
        raise MetaPeftError(
            f"`accelerate launch` was told to start {asked} processes, and started {processes}: it does not start several"
            f" on CPUs with --cpu or a MULTI_CPU config. {WORKING}"
        )


def _words_of_parent() -> list[str]:
    """The command line of the process that started this one."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _asked_of_accelerate(words: Sequence[str]) -> int | None:
    """How many processes a command line of `accelerate launch` asks for; None if it is another one, or does not say."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    names = [Path(word).name for word in words]
    launchers = [i for i, name in enumerate(names) if name == "launch" and i and names[i - 1].startswith("accelerate")]
    launchers += [i for i, name in enumerate(names) if name in ("accelerate-launch", "accelerate.commands.launch")]
    if not launchers:
        return None
    try:
        options = launch_command_parser().parse_known_args(list(words[launchers[0] + 1 :]))[0]
        if options.num_processes is not None:
            return int(options.num_processes)
        if options.config_file is None:
            return None
        return int(load_config_from_file(options.config_file).num_processes)
    except (Exception, SystemExit):  # a command line or a config that this version of Accelerate reads differently
        return None
