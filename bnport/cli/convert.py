"""`bnport convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common
from bnport.errors import InvalidValue, printable

if TYPE_CHECKING:
    import argparse

HELP = "Write a source's BatchNorm parameters into a copy of a target model, and prove the result."

EPILOG = """examples:
  bnport convert resnet50.pth resnet50.keras -o ported.keras
  bnport convert model.safetensors model.keras -o ported.keras --epsilon 1e-3
  bnport convert net.caffemodel net.keras -o ported.keras --prototxt deploy.prototxt
  bnport convert model.onnx model.weights.h5 -o ported.weights.h5 --dry-run
  bnport convert model.pth records.safetensors        (the neutral record file, to convert from later)

SRC and TARGET are not changed (TARGET only with --in-place). OUT appears whole and verified, or not at all."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("source", metavar="SRC", help="the model to read BatchNorm parameters from")
    parser.add_argument("target", metavar="TARGET", help="the model to put them into (it is not changed itself)")
    parser.add_argument("-o", "--out", metavar="OUT", help="the file to make: TARGET with SRC's BatchNorm")
    parser.add_argument("--only", metavar="FIELDS", help="write only these, of gamma,beta,mean,variance,epsilon")
    parser.add_argument(
        "--momentum", choices=("keep", "port"), default="keep", help="keep the target's momentum (default), or port it"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be written; write nothing")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="change TARGET itself, without a copy; if bnport is killed meanwhile, 'bnport restore TARGET' puts it back",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--run", action="store_true", help="also run the real layers in their frameworks")
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="compute mean and variance from DATA for the layers whose source stores none; if it stores all, for all, in"
        " place of its own (this runs the model)",
    )
    parser.add_argument("--calibrate-options", metavar="TEXT", help="of 'bnport calibrate', such as \"--limit 5000\"")
    common.add_sha256(parser)
    common.add_html(parser)
    common.add_json(parser)
    common.add_source_options(parser)
    common.add_pairing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, print the report, and say whether the output is the same function."""
    from bnport.convert import convert, save_records

    if args.calibrate_options is not None and args.calibrate is None:
        raise InvalidValue("--calibrate-options: say with --calibrate DATA what to compute mean and variance from")
    common.check_html(args, args.source, args.target, args.out)
    nowhere = args.out is None and not args.dry_run and not args.in_place
    if nowhere and args.target.endswith(".safetensors") and not _is_model(args.target):
        _refuse_with_records(args)
        report = save_records(
            args.source,
            args.target,
            epsilon=args.epsilon,
            force=args.force,
            sha256=args.sha256,
            options=common.source_options(args),
        )
        return common.finish(report, args)
    if nowhere:
        raise InvalidValue("name the file to make: -o OUT (TARGET itself is changed only with --in-place)")
    if args.in_place and args.out is not None:
        raise InvalidValue("--in-place changes TARGET itself; leave out either it or -o OUT")
    if args.calibrate is not None:
        return _calibrated(args)
    with common.Progress(args.json) as progress:
        report = convert(
            args.source,
            args.target,
            args.out,
            only=common.name_list(args.only) if args.only is not None else None,
            epsilon=args.epsilon,
            momentum=args.momentum,
            in_place=args.in_place,
            dry_run=args.dry_run,
            force=args.force,
            run=args.run,
            sha256=args.sha256,
            source_options=common.source_options(args),
            progress=progress,
            **common.pairing_options(args),
        )
    return common.finish(report, args)


def _is_model(path: str) -> bool:
    """Whether there is a file that is no record file of bnport, which --force then must not replace."""
    import os

    from bnport import adapters

    return os.path.lexists(path) and not (os.path.isfile(path) and adapters.find(path) is adapters.load("records"))


def _refuse_with_records(args: argparse.Namespace) -> None:
    """Raise InvalidValue for options that say how to write into a model, where only records are saved."""
    given = {
        "--only": args.only, "--map": args.map, "--skip": args.skip, "--only-under": args.only_under, "--run": args.run,
        "--momentum port": args.momentum == "port", "--target-epsilon": args.target_epsilon is not None,
        "--target-option": args.target_option, "--calibrate": args.calibrate is not None,
    }  # fmt: skip
    ignored = [option for option, value in given.items() if value]
    if ignored:
        raise InvalidValue(
            f"{printable(args.target)}: is no model, so all records of {printable(args.source)} would be saved in it;"
            f" {', '.join(ignored)} would do nothing. For a model name it as TARGET, and -o OUT"
        )


def _calibrated(args: argparse.Namespace) -> int:
    import argparse
    import shlex

    from bnport.calibrated import convert_calibrated
    from bnport.cli import calibrate

    if args.only is not None or args.dry_run or args.in_place:
        raise InvalidValue("--calibrate goes with none of --only, --dry-run and --in-place")
    parser = argparse.ArgumentParser(prog="bnport convert --calibrate-options", add_help=False)
    calibrate.configure(parser)
    try:
        words = shlex.split(args.calibrate_options or "")
    except ValueError as error:
        raise InvalidValue(f"--calibrate-options: {error}: {printable(args.calibrate_options)}") from None
    own = [args.target, "--data", args.calibrate, "-o", args.out or ""]
    chosen = parser.parse_args([*own, *words])
    plain = parser.parse_args(own)
    wrong = [n for n in ("model", "data", "out", "force", "json") if getattr(chosen, n) != getattr(plain, n)]
    if wrong:
        raise InvalidValue(f"--calibrate-options: {', '.join(wrong)}: options of convert, not of --calibrate-options")
    with common.Progress(args.json) as progress:
        report = convert_calibrated(
            args.source,
            args.target,
            args.out,
            args.calibrate,
            calibration=calibrate.options(chosen),
            epsilon=args.epsilon,
            momentum=args.momentum,
            source_options=common.source_options(args),
            force=args.force,
            run=args.run,
            sha256=args.sha256,
            progress=progress,
            **common.pairing_options(args),
        )
    return common.finish(report, args)
