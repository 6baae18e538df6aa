"""`bnport show`."""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.cli import common

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from bnport.layer import Layers
    from bnport.show import Summary

HELP = "List the BatchNorm layers of a model file: names, channels, epsilon, ranges, and what looks unhealthy."

EPILOG = """examples:
  bnport show resnet50.pth
  bnport show model.keras --no-values        (names, channels and epsilon only; reads no weights)
  bnport show checkpoint.pth --key model_ema --json

An epsilon or momentum with a star is assumed: the file does not store it, and the framework's default is shown."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("source", metavar="FILE", help="the model file")
    parser.add_argument("--no-values", action="store_true", help="names, channels and epsilon only; reads no weights")
    common.add_json(parser)
    common.add_source_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table or JSON; NotFound (exit code 2) where there is no BatchNorm."""
    from bnport.adapters import read_some
    from bnport.show import summarise

    layers = read_some(args.source, epsilon=args.epsilon, **common.source_options(args))
    summaries = [summarise(layer, values=not args.no_values) for layer in layers.values()]
    if args.json:
        common.print_json(_as_dict(layers, summaries))
    else:
        _print_table(layers, summaries)
    return 0


def _print_table(layers: Layers, summaries: list[Summary]) -> None:
    from bnport.errors import printable
    from bnport.report import grouped, number, table

    fields = [field for field in ("gamma", "beta", "mean", "variance") if any(field in s.ranges for s in summaries)]
    rows = []
    for layer, ranges, _ in summaries:
        epsilon = "?" if layer.question else _starred(layer.epsilon, "epsilon" in layer.assumed)
        row = [layer.name, str(layer.channels), epsilon]
        row.append("-" if layer.momentum is None else _starred(layer.momentum, "momentum" in layer.assumed))
        row += [f"{number(ranges[f].low)} .. {number(ranges[f].high)}" if f in ranges else "-" for f in fields]
        rows.append(row)
    common.say(table(("layer", "channels", "epsilon", "momentum", *fields), rows, right=(1,)))
    for line in grouped((summary.layer.name, summary.warnings) for summary in summaries):
        common.say(line)
    for note in layers.notes:
        common.say(f"note: {printable(note, 600)}")
    assumed = sum("epsilon" in layer.assumed for layer in layers.values())
    if assumed:
        common.say(
            f"* assumed for {assumed} layers: {printable(layers.source)} does not store it; set epsilon with --epsilon"
        )
    common.say(f"{printable(layers.source)}: {len(layers)} BatchNorm layers, {layers.format}")


def _starred(value: float, assumed: bool) -> str:
    return f"{value!r}*" if assumed else repr(value)


def _as_dict(layers: Layers, summaries: list[Summary]) -> dict[str, Any]:
    from bnport.report import finite

    return {
        "source": layers.source,
        "format": layers.format,
        "notes": list(layers.notes),
        "layers": [
            {
                "name": layer.name,
                "channels": layer.channels,
                "epsilon": None if layer.question else layer.epsilon,
                "momentum": layer.momentum,
                "assumed": sorted(layer.assumed),
                "stores": sorted(layer.stores),
                "dtype": layer.dtype,
                "ranges": {f: [finite(r.low), finite(r.high)] for f, r in ranges.items()},
                "warnings": list(warnings),
            }
            for layer, ranges, warnings in summaries
        ],
    }
