"""``meta-peft push``: a saved adapter to the hub."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the folder of a saved adapter, of either kind")
    parser.add_argument(
        "--to", required=True, metavar="ID", help="where on the hub: user/name; made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="the branch to write to (default: main)")


def run(options: argparse.Namespace) -> int:
    from meta_peft.hub import push

    print(push(options.adapter, options.to, private=True if options.private else None, revision=options.revision))
    return 0
