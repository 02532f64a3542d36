"""``meta-peft push``: a saved adapter to the hub."""

from __future__ import annotations

import argparse

ABOUT = "A saved adapter, meta-learned or adapted, to the hub."
USAGE = "--adapter DIR --to ID [options]"
EXAMPLES = """example:
  meta-peft push --adapter outputs/mine --to me/my-adapter --private"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the folder of the adapter")
    parser.add_argument("--to", required=True, metavar="ID", help="user/name on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="NAME", help="the branch to write to (main)")


def run(options: argparse.Namespace) -> int:
    from meta_peft.adapters.hub import push

    print(push(options.adapter, options.to, private=True if options.private else None, revision=options.revision))
    return 0
