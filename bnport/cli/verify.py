"""`bnport verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

HELP = "Are the BatchNorm layers of two models the same functions? Exit code 0 yes, 1 no, 2 could not compare."

EPILOG = """examples:
  bnport verify resnet50.pth ported.keras
  bnport verify resnet50.pth ported.keras --run          (also run the real layers)
  bnport verify a.onnx b.caffemodel --map pairs.toml --json

Both files may be of any readable format (see 'bnport formats'). Two layers are the same function on every input iff
a = gamma / sqrt(variance + epsilon) and b = beta - mean a agree; the bound for float32 rounding is derived, not chosen."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("source", metavar="A", help="the original")
    parser.add_argument("target", metavar="B", help="the model to check against it")
    parser.add_argument("--run", action="store_true", help="also run the real layers in their frameworks")
    common.add_sha256(parser)
    common.add_html(parser)
    parser.add_argument("--force", action="store_true", help="replace the --html file if it exists")
    common.add_json(parser)
    common.add_source_options(parser)
    common.add_pairing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print the report, and say whether they are the same functions."""
    from bnport.convert import verify

    common.check_html(args, args.source, args.target)
    with common.Progress(args.json) as progress:
        report = verify(
            args.source,
            args.target,
            epsilon=args.epsilon,
            run=args.run,
            sha256=args.sha256,
            source_options=common.source_options(args),
            progress=progress,
            **common.pairing_options(args),
        )
    code = common.finish(report, args)
    if code and not args.json:
        import shlex

        common.say(
            f"bnport explain {shlex.quote(args.source)} {shlex.quote(args.target)} looks for the mistake behind it"
        )
    return code
