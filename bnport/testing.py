"""Assertions for your own test suite: is the port still the same function?

    from bnport.testing import assert_equivalent, assert_same_outputs

    assert_equivalent("resnet50.pth", keras_model)              # every BatchNorm layer, decided on its numbers
    assert_same_outputs(torch_model, keras_model, images)       # whole networks, on real input

Both take files and live models of any readable format and name, when they fail, the layer, the channel, what was expected
and got, and the mistake that was probably made. For suites whose two frameworks are never installed together, the pytest
fixture `bnport_golden` (bnport/pytest_plugin.py) records in one environment and compares in the other.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bnport import adapters
from bnport.convert import pair
from bnport.errors import InvalidValue, listed, printable
from bnport.explain import explain
from bnport.verify import compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bnport.explain import Explanation
    from bnport.layer import Layers
    from bnport.verify import LayerReport

__all__ = ["assert_equivalent", "assert_same_outputs"]

_SHOWN = 5  # layers spelled out in a message


def assert_equivalent(
    a: Any,
    b: Any,
    *,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
    epsilon: float | None = None,
    target_epsilon: float | None = None,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
) -> None:
    """Fail unless every BatchNorm layer of `b` is the same function as its counterpart in `a`, for every input.

    a is the original, b the port; files or live objects. Decided on slope and intercept in float64 against the derived
    bound for rounding, not by sampling. map, skip, only_under, epsilon and the options are those of `bnport.convert`.
    Raises AssertionError that names layer, channel, expected and got, and the likely mistake; bnport errors where the two
    cannot be compared at all.
    """
    __tracebackhide__ = True
    sources = adapters.read_some(a, epsilon=epsilon, **adapters.checked(source_options, "source_options"))
    targets = adapters.read_some(b, epsilon=target_epsilon, **adapters.checked(target_options, "target_options"))
    match = pair(sources, targets, map=map, skip=skip, only_under=only_under)
    reports = compare(sources, targets, match.pairs)
    bad = [report for report in reports.values() if not report.ok]
    if bad:
        live = not isinstance(b, str | os.PathLike)
        explanation = explain(sources, targets, match.pairs, live=live)
        raise AssertionError(_differing(sources, targets, bad, len(reports), explanation))


def assert_same_outputs(
    model_a: Any,
    model_b: Any,
    inputs: Any,
    *,
    layout: str | None = None,
    tolerance: float | None = None,
    map: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
    only_under: str | None = None,
) -> None:
    """Fail unless two whole models give the same outputs for `inputs`; say where they part if they do not.

    model_a, model_b: live torch or Keras models, or paths of .onnx files; inputs: an array (N, ...), `layout`
    ("NCHW", "NHWC") where that is not plain from its shape. tolerance: what `bnport.trace` takes for a difference between
    networks. map, skip, only_under: as for `bnport.convert`. Raises AssertionError that names the first BatchNorm layer at
    which they part, whether it is that layer or something before it, the channel, expected and got, and the likely mistake;
    bnport errors where the two cannot run or cannot be compared: what `bnport.trace` refuses, and outputs so sensitive to
    rounding that any would agree.
    """
    __tracebackhide__ = True
    from bnport.trace import trace

    result = trace(
        model_a, model_b, inputs, layout=layout, tolerance=tolerance,
        map=map, skip=skip, only_under=only_under,
    )  # fmt: skip
    if not result.ok:
        raise AssertionError(str(result))
    if result.not_compared:
        raise InvalidValue(f"nothing is known of the outputs: {result.not_compared}")


def _differing(sources: Layers, targets: Layers, bad: list[LayerReport], count: int, explanation: Explanation) -> str:
    head = f"{printable(targets.source)} is not the same function as {printable(sources.source)}"
    lines = [f"{head}: {len(bad)} of {count} BatchNorm layers differ"]
    worst = sorted(bad, key=lambda report: report.worst.ratio if report.worst else float("inf"), reverse=True)
    lines += [f"  {_line(sources, targets, report)}" for report in worst[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {listed([report.target for report in worst[_SHOWN:]], 4)}")
    for verdict in explanation.verdicts:
        lines.append(f"likely mistake: {verdict.title} ({listed(verdict.layers, 4)})")
        lines.append(f"  evidence: {verdict.evidence}")
        lines.append(f"  repair:   {verdict.repair.splitlines()[0]}")
    if explanation.unexplained:
        lines.append(f"no known mistake explains {listed(explanation.unexplained, 4)}")
        lines += [f"  {lead}" for lead in explanation.leads]
    return "\n".join(lines)


def _line(sources: Layers, targets: Layers, report: LayerReport) -> str:
    where = f"{printable(report.target)} (of {printable(report.source)})"
    worst = report.worst
    if worst is None:
        return f"{where}: {'; '.join(report.notes)}"
    index, word = {"a": (0, "slope gamma / sqrt(variance + epsilon)")}.get(
        worst.name, (1, "intercept beta - mean * slope")
    )
    expected = sources[report.source].record.affine()[index][worst.channel]
    got = targets[report.target].record.affine()[index][worst.channel]
    times = f"{worst.ratio:.3g} times the bound {worst.bound:.2g}"
    return f"{where}, channel {worst.channel}: {word}: expected {expected:.8g}, got {got:.8g} ({times})"
