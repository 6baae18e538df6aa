"""A Report as text for a terminal and as plain JSON values."""

from __future__ import annotations

import math

from bnport._lazy import TYPE_CHECKING
from bnport.errors import listed, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from bnport.verify import Check, LayerReport, Report


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns two spaces apart, padded to their widest cell; the columns in `right` are aligned to the right."""
    cells = [list(header), *([printable(cell, 60) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    aligned_right = set(right)
    lines = [
        "  ".join(
            c.rjust(w) if i in aligned_right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def number(value: float) -> str:
    """Three significant digits, short."""
    return "0" if value == 0 else f"{value:.3g}"


def finite(value: float) -> float | None:
    """The number for JSON, which has no infinity and no NaN: None for those."""
    return value if math.isfinite(value) else None


def as_text(report: Report) -> str:
    """The report for a person: one line a layer, then what was assumed, what was not run, and the verdict last."""
    parts = []
    if report.layers:
        rows = [_row(layer) for layer in report.layers]
        parts.append(
            table(("target", "source", "channels", "result", "worst check", "error / bound"), rows, right=(2, 5))
        )
    parts += grouped((layer.target, layer.notes) for layer in report.layers)
    parts += [f"note: {printable(note, 600)}" for note in report.notes]
    parts += [f"{word}: {listed(names, 12)}" for word, names in report.left.items()]
    parts += [f"not run: {printable(what, 300)}" for what in report.not_run]
    parts += [f"sha256 {digest}  {printable(path)}" for path, digest in report.sha256.items()]
    parts.append(verdict(report))
    return "\n".join(parts)


def verdict(report: Report) -> str:
    """One line: what was done, how many layers of each status, and whether it is all right."""
    kinds = ("exact", "bounded", "different", "invalid")
    counts = ", ".join(f"{report.count(kind)} {kind}" for kind in kinds if report.count(kind)) or "no layers"
    what = f"{printable(report.source)} -> {printable(report.out or report.target)}"
    if report.action == "convert":
        done = "written and verified" if report.ok else "NOT written"
    elif report.action == "dry run":
        done = (
            "would be the same function; nothing written"
            if report.ok
            else "would NOT be the same function; nothing written"
        )
    else:
        done = "the same function" if report.ok else "NOT the same function"
    return f"{what}: {len(report.layers)} layers ({counts}), {done}"


def _row(layer: LayerReport) -> tuple[str, ...]:
    worst = layer.worst
    if worst is None:
        return layer.target, layer.source, str(layer.channels), layer.status, "", ""
    where = f"{worst.name}, channel {worst.channel}" if worst.ratio > 0 else worst.name
    ratio = "0" if worst.ratio == 0 else f"{number(worst.error)} / {number(worst.bound)}"
    return (
        layer.target,
        layer.source,
        str(layer.channels),
        layer.status,
        where if worst.ratio > 0 else "all equal",
        ratio,
    )


def grouped(notes: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """One line for every different note, of (layer name, its notes): whose it is, or how many layers share it."""
    found: dict[str, list[str]] = {}
    for name, said in notes:
        for note in said:
            found.setdefault(note, []).append(name)
    return [
        f"{printable(names[0]) if len(names) == 1 else f'{len(names)} layers'}: {printable(note, 600)}"
        for note, names in found.items()
    ]


def as_dict(report: Report) -> dict[str, Any]:
    """Everything in the report as JSON values; an infinite or undefined number becomes null."""
    return {
        "action": report.action,
        "ok": report.ok,
        "source": report.source,
        "target": report.target,
        "out": report.out,
        "layers": [
            {
                "target": layer.target,
                "source": layer.source,
                "channels": layer.channels,
                "status": layer.status,
                "written": list(layer.written),
                "notes": list(layer.notes),
                "evidence": layer.evidence,
                "checks": [_check(check) for check in layer.checks],
            }
            for layer in report.layers
        ],
        "notes": list(report.notes),
        "not_run": list(report.not_run),
        "left": {word: list(names) for word, names in report.left.items()},
        "sha256": report.sha256,
    }


def _check(check: Check) -> dict[str, Any]:
    values = {**check._asdict(), "ok": check.ok}
    return {k: finite(v) if isinstance(v, float) else v for k, v in values.items()}
