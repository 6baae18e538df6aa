"""`bnport formats`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common

if TYPE_CHECKING:
    import argparse
    from typing import Any

HELP = "The formats that bnport reads and writes; with a name, that framework's conventions."

EPILOG = """examples:
  bnport formats
  bnport formats keras"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this format's mapping table")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the formats, or one format's table."""
    from bnport import adapters
    from bnport.report import table

    found = {name: adapters.load(name) for name in ([args.name] if args.name else adapters.names())}
    if args.name and not args.json:
        common.say((found[args.name].__doc__ or "").strip())
        return 0
    described: dict[str, Any] = {
        name: {
            "files": list(adapter.SUFFIXES),
            "live objects of": list(adapter.PACKAGES),
            "writes files": hasattr(adapter, "write"),
            "writes live objects": hasattr(adapter, "apply"),
            "options": sorted(adapter.read.__kwdefaults__ or {}),
        }
        for name, adapter in found.items()
    }
    if args.json:
        if args.name:
            described = {**described[args.name], "conventions": (found[args.name].__doc__ or "").strip()}
        common.print_json(described)
        return 0
    rows = [
        (
            name,
            " ".join(map(str, values["files"])),
            " ".join(values["live objects of"]),
            "yes" if values["writes files"] else "no",
            " ".join(values["options"]),
        )
        for name, values in described.items()
    ]
    common.say(table(("format", "files", "live objects of", "writes", "options"), rows))
    return 0
