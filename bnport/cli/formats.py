"""`bnport formats`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

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

    if args.name:
        print((adapters.load(args.name).__doc__ or "").strip())
        return 0
    found = {name: adapters.load(name) for name in adapters.names()}
    described = {
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
        common.print_json(described)
        return 0
    rows = [
        (
            name,
            " ".join(map(str, values["files"])),  # type: ignore[call-overload]
            " ".join(values["live objects of"]),  # type: ignore[arg-type]
            "yes" if values["writes files"] else "no",
            " ".join(values["options"]),  # type: ignore[arg-type]
        )
        for name, values in described.items()
    ]
    print(table(("format", "files", "live objects of", "writes", "options"), rows))
    return 0
