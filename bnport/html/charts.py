"""The drawings of a report: error against bound for every layer, and slope and intercept channel by channel. Inline SVG."""

from __future__ import annotations

import itertools
import math
from html import escape
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnport.record import Array
    from bnport.verify import Check, Compared, LayerReport

_LOWEST = -4  # log10 of the smallest error / bound that is drawn at its place; what is smaller sits on the floor
_BINS = 160  # columns of a channel view; more channels than that share columns
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
RUN = "run"
AFFINE = "affine"


def text(value: object, limit: int = 200) -> str:
    """A stranger's text for a page: control characters escaped, then markup."""
    return escape(printable(value, limit))


def number(value: float) -> str:
    """Four significant digits, or a word for what is none."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown, _, exponent = f"{value:.4g}".partition("e")
    if exponent:
        shown += f" · 10{str(int(exponent)).translate(_RAISED)}"
    return shown.replace("-", "−")


def kind(check: Check) -> str:
    """Whether a check compared numbers, or outputs of a real engine."""
    return AFFINE if check.name in ("a", "b", "bits") else RUN


def worst_of(layer: LayerReport, what: str) -> Check | None:
    """The layer's worst check of one kind."""
    return max((c for c in layer.checks if kind(c) == what), key=lambda check: check.ratio, default=None)


def overview(layers: Sequence[LayerReport], anchors: bool = True) -> str:
    """Every layer's error over its bound, on a logarithmic scale; the bound is the line at 1."""
    width, height, left, right, top, floor, equal = 1000, 312, 56, 16, 20, 232, 256
    ratios = [c.ratio for layer in layers for c in layer.checks if math.isfinite(c.ratio) and c.ratio > 0]
    highest = max(1.0, math.ceil(math.log10(max(ratios, default=1.0)) + 0.2))
    highest = min(highest, 12.0)
    middle = top + (floor - top) * min(0.45, 0.12 * highest)  # where the bound lies: room for both sides of it

    def y_of(ratio: float) -> float:
        if ratio <= 0:
            return float(equal)
        exponent = min(max(math.log10(ratio), _LOWEST), highest)
        if exponent > 0:
            return middle - exponent / highest * (middle - top)
        return middle + exponent / _LOWEST * (floor - middle)

    bound = y_of(1.0)
    parts = [
        f'<svg class="overview" viewBox="0 0 {width} {height}" role="img" aria-label="error over bound, layer by layer">',
        f'<rect class="beyond" x="{left}" y="{top}" width="{width - left - right}" height="{bound - top:.1f}"/>',
    ]
    above = range(0, int(highest) + 1, max(1, math.ceil(highest / 4)))
    for exponent in (*range(_LOWEST, 0), *above):
        y = y_of(10.0**exponent)
        label = {0: "1", 1: "10", -1: "0.1"}.get(exponent, f'10<tspan dy="-5" font-size="9">{exponent}</tspan>')
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<line class="bound" x1="{left}" x2="{width - right}" y1="{bound:.1f}" y2="{bound:.1f}"/>')
    parts.append(
        f'<text class="bound-label" x="{width - right - 4}" y="{bound - 6:.1f}" text-anchor="end">bound</text>'
    )
    parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{equal}" y2="{equal}"/>')
    parts.append(f'<text class="tick" x="{left - 8}" y="{equal + 4}" text-anchor="end">equal</text>')
    room = (width - left - right - 20) / max(len(layers), 1)
    for index, layer in enumerate(layers):
        x = left + 10 + room * (index + 0.5)
        parts.append(_column(layer, index, x, room, y_of, equal, top, anchors))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if len(layers) / n <= 20)
    for index in range(0, len(layers), every):
        x = left + 10 + room * (index + 0.5)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{equal + 20}" text-anchor="middle">{index + 1}</text>')
    parts.append(f'<text class="tick" x="{(left + width) / 2:.0f}" y="{equal + 42}" text-anchor="middle">layer</text>')
    parts.append(
        f'<text class="tick" transform="rotate(-90 14 {(top + floor) / 2:.0f})" x="14" y="{(top + floor) / 2:.0f}"'
        ' text-anchor="middle">error / bound</text>'
    )
    return "".join([*parts, "</svg>"])


def _column(
    layer: LayerReport, index: int, x: float, room: float, y_of: object, floor: float, top: float, anchors: bool
) -> str:
    """One layer's stem and marks: a round one for the numbers, a square one for the real engines."""
    said = [f"{index + 1}. {layer.target}: {layer.status}"]
    marks = []
    size = max(1.6, min(4.5, room * 0.4))
    highest = floor
    for what in (AFFINE, RUN):
        check = worst_of(layer, what)
        if check is None:
            continue
        y = y_of(check.ratio)  # type: ignore[operator]
        highest = min(highest, y)
        said.append(f"{check.name}: {number(check.ratio)} of the bound, channel {check.channel}")
        state = "bad" if not check.ok else "exact" if check.ratio == 0 else "good"
        if what == AFFINE:
            marks.append(f'<circle class="mark {state}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>')
        else:
            marks.append(
                f'<rect class="mark {state}" x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}"'
                f' height="{2 * size:.1f}"/>'
            )
    if layer.status == "invalid":
        highest = top
        marks.append(
            f'<path class="mark bad" d="M{x - size:.1f} {top - size:.1f}l{2 * size:.1f} {2 * size:.1f}m0 {-2 * size:.1f}'
            f'l{-2 * size:.1f} {2 * size:.1f}"/>'
        )
    stem = f'<line class="stem" x1="{x:.1f}" x2="{x:.1f}" y1="{floor:.1f}" y2="{highest:.1f}"/>' if room > 2.5 else ""
    hit = f'<rect class="hit" x="{x - room / 2:.1f}" y="{top}" width="{room:.1f}" height="{floor - top:.1f}"/>'
    body = f"<title>{text(chr(10).join(said), 600).replace(chr(92) + 'n', '&#10;')}</title>{hit}{stem}{''.join(marks)}"
    return f'<a href="#layer-{index + 1}">{body}</a>' if anchors else f"<g>{body}</g>"


def channels(compared: Compared) -> str:
    """Slope and intercept of every channel on both sides, and each channel's error over its bound below."""
    (a, new_a, ratio_a), (b, new_b, ratio_b) = compared.affine()
    return "".join(
        f'<figure><figcaption>{title}</figcaption>{_panel(one, other, ratio)}</figure>'
        for title, one, other, ratio in (
            ("slope a = γ / √(variance + ε)", a, new_a, ratio_a),
            ("intercept b = β − mean · a", b, new_b, ratio_b),
        )
    )  # fmt: skip


def _panel(one: Array, other: Array, ratio: Array) -> str:
    width, top, bottom, low, floor = 480, 8, 112, 124, 164
    bins = min(_BINS, one.size)
    edges = np.linspace(0, one.size, bins + 1).astype(int)
    finite = np.concatenate([one, other])
    finite = finite[np.isfinite(finite)]
    lowest, highest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    # slopes have heavy tails (small variances): near zero the scale is linear, beyond the median size logarithmic
    unit = float(np.median(np.abs(finite))) if finite.size else 1.0
    unit = unit or highest or 1.0
    least, most = math.asinh(lowest / unit), math.asinh(highest / unit)
    span = (most - least) or 1.0
    least, most = least - 0.06 * span, most + 0.06 * span
    room = (width - 60) / bins

    def y_of(value: float) -> int:
        return round(top + (most - math.asinh(value / unit)) / (most - least) * (bottom - top))

    parts = [f'<svg class="channels" viewBox="0 0 {width} 184" role="img">']
    parts += [
        f'<text class="tick" x="52" y="{y_of(value) + 4}" text-anchor="end">{number(value)}</text>'
        for value in dict.fromkeys((highest, lowest))
    ]
    if lowest < 0 < highest:
        parts.append(f'<line class="grid" x1="56" x2="{width - 4}" y1="{y_of(0)}" y2="{y_of(0)}"/>')
    wide = max(1.2, min(7.0, room * 0.85))
    for name, values, stroke in (("source", one, wide), ("held", other, wide * 0.4)):
        parts.append(f'<path class="{name}" stroke-width="{stroke:.1f}" d="{_steps(values, edges, room, y_of)}"/>')
    parts.append(_ratios(ratio, edges, room, width, low, floor))
    parts.append(f'<text class="tick" x="56" y="180">channel 0</text><text class="tick" x="{width - 4}" y="180"'
                 f' text-anchor="end">{one.size - 1}</text></svg>')  # fmt: skip
    return "".join(parts)


def _steps(values: Array, edges: Array, room: float, y_of: object) -> str:
    """A path of one short stroke per column, from the least to the greatest value of the channels in it."""
    path = []
    for column, (start, end) in enumerate(itertools.pairwise(edges)):
        chosen = values[start:end][np.isfinite(values[start:end])]
        if not chosen.size:
            continue
        least, most = y_of(float(chosen.max())), y_of(float(chosen.min()))  # type: ignore[operator]
        x = 56 + room * (column + 0.5)
        path.append(f"M{x:.1f} {least - 2}V{most + 2}")
    return "".join(path)


def _ratios(ratio: Array, edges: Array, room: float, width: int, low: int, floor: int) -> str:
    """Bars of error / bound, logarithmic from 1e-2; those beyond the bound in the colour of a fault."""
    if not ratio.any():
        return (
            f'<text class="tick equal" x="{(56 + width) / 2:.0f}" y="{(low + floor) // 2 + 4}" text-anchor="middle">'
            f"equal in all {ratio.size} channels</text>"
        )
    top = max(1.0, math.ceil(math.log10(min(float(np.max(ratio)), 1e12)) + 0.1) if np.max(ratio) > 0 else 1.0)
    scale = (floor - low) / (top + 2)
    good: list[str] = []
    bad: list[str] = []
    for column, (start, end) in enumerate(itertools.pairwise(edges)):
        worst = float(np.max(ratio[start:end]))
        if worst <= 0:
            continue
        tall = round(scale * (min(math.log10(min(worst, 1e12)), top) + 2))
        (bad if worst > 1 else good).append(f"M{56 + room * (column + 0.5):.1f} {floor}v{-max(tall, 1)}")
    bound, wide = floor - scale * 2, max(1.0, min(5.0, room * 0.7))
    return (
        f'<path class="bar good" stroke-width="{wide:.1f}" d="{"".join(good)}"/>'
        f'<path class="bar bad" stroke-width="{wide:.1f}" d="{"".join(bad)}"/>'
        f'<line class="bound" x1="56" x2="{width - 4}" y1="{bound:.1f}" y2="{bound:.1f}"/>'
        f'<text class="tick" x="52" y="{bound + 4:.1f}" text-anchor="end">bound</text>'
    )
