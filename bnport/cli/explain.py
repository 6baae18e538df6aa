"""`bnport explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnport.cli import common

if TYPE_CHECKING:
    import argparse

HELP = "A port differs: which known mistake turns the source's numbers into the ported ones, and what repairs it?"

EPILOG = """examples:
  bnport explain resnet50.pth ported.keras
  bnport explain model.onnx ported.weights.h5 --map pairs.toml --json

Known mistakes: arrays in another order; std or inverse std for the variance, or the reverse; the epsilon of another
framework, or outside the root; Caffe's factor not applied or applied twice; MXNet's ignored gamma; n / (n - 1);
|gamma| + epsilon; the root taken twice; layers swapped; initial values left in place; PyTorch's momentum in Keras;
partial copies; channels permuted; 16-bit rounding. A mistake is named only if it reproduces every channel to within
rounding; where none does, that is said. Exit code 0 nothing differs, 1 something does, 2 could not compare."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("source", metavar="SRC", help="the original")
    parser.add_argument("ported", metavar="PORTED", help="the port that differs")
    common.add_json(parser)
    common.add_source_options(parser)
    common.add_pairing_options(parser)


def run(args: argparse.Namespace) -> int:
    """Explain, print, and say whether anything differs."""
    from bnport.diagnosis import explain

    with common.Progress(args.json) as progress:
        explanation = explain(
            args.source,
            args.ported,
            epsilon=args.epsilon,
            source_options=common.source_options(args),
            command_options=_repeated(args),
            progress=progress,
            **common.pairing_options(args),
        )
    if args.json:
        common.print_json(explanation.to_dict())
    else:
        common.say(explanation)
    return 0 if explanation.same else 1


def _repeated(args: argparse.Namespace) -> str:
    """The options of this call that `bnport convert` needs again, as on a command line."""
    import shlex

    words = []
    for name in ("epsilon", "format", "map", "only_under", "target_epsilon", *common.ADAPTER_OPTIONS):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for name in common.ADAPTER_FLAGS:
        if getattr(args, name):
            words.append(f"--{name.replace('_', '-')}")
    for name in ("skip", "target_option"):
        for value in getattr(args, name):
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join(words)
