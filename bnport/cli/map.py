"""`bnport map`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

HELP = "Show which layer belongs to which, with the evidence, as a file to review and give to --map."

EPILOG = """examples:
  bnport map resnet50.pth resnet50.keras
  bnport map resnet50.pth resnet50.keras -o names.toml
  bnport map detector.pth backbone.keras -o names.toml --only-under backbone --skip 'backbone.aux.*'
  bnport convert resnet50.pth resnet50.keras -o ported.keras --map names.toml

Exit code 1 if questions are left open in the file."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("source", metavar="SRC", help="the model that has the parameters")
    parser.add_argument("target", metavar="TARGET", help="the model that will get them")
    parser.add_argument("-o", "--out", metavar="FILE", help="the map file to write (default: standard output)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    common.add_json(parser)
    common.add_source_options(parser)
    common.add_pairing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Pair the two models and write the map; nothing else is written."""
    from bnport import adapters, mapfile
    from bnport.match import match

    sources = adapters.read_some(args.source, epsilon=args.epsilon, **common.source_options(args))
    pairing = common.pairing_options(args)
    targets = adapters.read_target(args.target, epsilon=pairing["target_epsilon"], **pairing["target_options"])
    found = match(sources, targets, map=pairing.get("map"), skip=pairing["skip"], only_under=pairing["only_under"])
    text = mapfile.text(found, sources, targets, args.out or "names.toml")
    if args.out is None:
        if args.json:
            common.print_json({**found.to_dict(), "map": text})
        else:
            common.say(text, end="")
        return 0 if found.ok else 1
    from bnport.containers.files import replace_file

    def write(path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    inputs = [args.source, args.target, *([args.map] if args.map and not args.force else [])]
    replace_file(args.out, write, _read_back, force=args.force, inputs=inputs)
    args.written = [args.out]
    if args.json:
        common.print_json({**found.to_dict(), "out": args.out})
        return 0 if found.ok else 1
    settled = len(found.pairs) - len(found.guessed)
    common.say(f"{args.out}: {settled} pairs{f', {len(found.guessed)} likely' if found.guessed else ''}")
    if not found.ok:
        common.say(found.problems())
    return 0 if found.ok else 1


def _read_back(path: str) -> None:
    from bnport.mapfile import read_map

    read_map(path)
