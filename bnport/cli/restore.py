"""`bnport restore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

HELP = "Put back the contents that a file had before an interrupted 'bnport convert --in-place'."

EPILOG = """examples:
  bnport restore model.keras

While a file is changed in place its old bytes are kept beside it (model.keras.bnport-undo) and nothing can open it. If
bnport is killed or the power fails meanwhile, this puts the old bytes back and removes that file."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("file", metavar="FILE", help="the file that was being changed")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Put it back and say so; NotFound (exit code 2) where there is nothing to put back."""
    from bnport.containers.in_place import restore
    from bnport.errors import NotFound

    if not args.file:
        raise NotFound("a file's name is empty")
    said = restore(args.file)
    if args.json:
        common.print_json({"file": args.file, "done": said})
    else:
        common.say(said)
    return 0
