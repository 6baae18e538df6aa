"""A Report as one self-contained page, and as a fragment for notebooks: no script, nothing loaded from anywhere.

charts.py   the drawings
style.css   read into the page
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from bnport.html.charts import channels, number, overview, text
from bnport.report import verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bnport.verify import LayerReport, Report

_MOST_IN_NOTEBOOK = 30  # rows; the chart shows all layers, and the whole page is one call away
_MOST_CHANNELS_NAMED = 5


_START = '<!doctype html><html lang="en"><head><meta charset="utf-8">'


def check_page(path: str, *, force: bool = False, models: Iterable[str] = ()) -> None:
    """Refuse a page that must not be written, before any work is done: at one of the `models` (also one not made yet).

    With `force` a file is replaced only if it is such a page.
    """

    from bnport.containers.files import check_output
    from bnport.errors import OutputError, printable

    models = list(models)
    for model in models:
        if os.path.realpath(path) == os.path.realpath(model):
            raise OutputError(
                f"{printable(path)}: is the model {printable(model)} itself; choose another name for the page"
            )
    check_output(path, force=force, inputs=models)
    if os.path.exists(path):
        with open(path, "rb") as file:
            if not file.read(len(_START)).startswith(_START.encode()):
                raise OutputError(
                    f"{printable(path)}: exists and is not a page that bnport wrote; --force replaces only those"
                )


def write_page(report: Report, path: str, *, force: bool = False) -> None:
    """Write the page of a report to `path`, whole or not at all; an existing file only with `force`."""
    from bnport.containers.files import replace_file

    def build(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(page(report))

    replace_file(path, build, force=force)


def page(report: Report) -> str:
    """The whole page. Every name in it is escaped; its policy lets a browser run no script and load nothing."""
    title = f"bnport {report.action}: {report.source} → {report.out or report.target}"
    return (
        f"{_START}"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{_style()}</style></head>"
        f'<body class="bnport-page"><main class="bnport">{_head(report)}{_chart(report, True)}'
        f"{''.join(_layer(n, layer) for n, layer in enumerate(report.layers, 1))}{_foot(report)}</main></body></html>\n"
    )


def fragment(report: Report) -> str:
    """The report for a notebook: verdict, chart, and the layers that matter most; without the channel views."""
    ranked = sorted(report.layers, key=lambda layer: -(layer.worst.ratio if layer.worst else math.inf))
    rows = ranked[:_MOST_IN_NOTEBOOK]
    left = len(report.layers) - len(rows)
    table = "".join(
        f"<tr><td>{text(layer.target)}</td><td>{text(layer.source)}</td><td>{layer.channels}</td><td>{_pill(layer)}</td>"
        f"<td>{_worst(layer)}</td></tr>"
        for layer in rows
    )
    more = (
        f'<p class="quiet">and {left} more layers, each nearer to exact; see <code>print(report)</code></p>'
        if left
        else ""
    )
    return (
        f'<style>{_style()}</style><div class="bnport">{_head(report)}{_chart(report, False)}<table><thead><tr>'
        f"<th>target</th><th>source</th><th>channels</th><th>result</th><th>worst check</th></tr></thead><tbody>{table}"
        f"</tbody></table>{more}{_foot(report)}</div>"
    )


def _style() -> str:
    with open(os.path.join(os.path.dirname(__file__), "style.css"), encoding="utf-8") as file:
        return " ".join(file.read().split())


def _head(report: Report) -> str:
    state = "good" if report.ok else "bad"
    said = verdict(report).rsplit("layers (", 1)[-1]
    counts, _, done = said.partition("), ")
    return (
        f'<header><p class="quiet">bnport {text(report.action)}</p><h1><span class="path">{text(report.source)}</span>'
        f'<span class="arrow">→</span><span class="path">{text(report.out or report.target)}</span></h1>'
        f'<p class="verdict {state}"><strong>{text(done)}</strong> {len(report.layers)} layers: {text(counts)}</p></header>'
    )


def _chart(report: Report, anchors: bool) -> str:
    run = any(check.name not in ("a", "b", "bits") for layer in report.layers for check in layer.checks)
    keys = (
        '<span class="key"><svg viewBox="0 0 12 12"><circle class="mark good" cx="6" cy="6" r="4"/></svg>numbers</span>'
    )
    if run:
        keys += (
            '<span class="key"><svg viewBox="0 0 12 12"><rect class="mark good" x="2" y="2" width="8" height="8"/></svg>'
            "real engines, run</span>"
        )
    keys += (
        '<span class="key"><svg viewBox="0 0 12 12"><circle class="mark exact" cx="6" cy="6" r="4"/></svg>exactly equal</span>'
        '<span class="key"><svg viewBox="0 0 12 12"><circle class="mark bad" cx="6" cy="6" r="4"/></svg>beyond'
        " the bound</span>"
    )
    return (
        f'<section><h2>Error against bound</h2><p class="quiet">The bound is derived from float rounding, not chosen.</p>'
        f'{overview(report.layers, anchors)}<p class="keys">{keys}</p></section>'
    )


def _pill(layer: LayerReport) -> str:
    return f'<span class="pill {text(layer.status)}">{text(layer.status)}</span>'


def _worst(layer: LayerReport) -> str:
    worst = layer.worst
    if worst is None:
        return text("; ".join(layer.notes), 300)
    if worst.ratio == 0:
        return '<span class="quiet">all equal</span>'
    return f"{text(worst.name)}, channel {worst.channel}: {number(worst.error)} / {number(worst.bound)}"


def _layer(index: int, layer: LayerReport) -> str:
    worst = layer.worst
    ratio = worst.ratio if worst else math.inf
    open_ = "" if layer.ok else " open"
    return (
        f'<details id="layer-{index}" class="layer"{open_}><summary><span class="index">{index}</span>'
        f'<span class="name">{text(layer.target)}</span><span class="from">{text(layer.source)}</span>'
        f'<span class="count">{layer.channels}</span>{_pill(layer)}<span class="ratio">{_bar(ratio)}</span></summary>'
        f'<div class="inside">{"".join(_inside(layer))}</div></details>'
    )


def _bar(ratio: float) -> str:
    """A small bar of error over bound, logarithmic from 1e-4 to 1e4 with the bound in the middle."""
    if ratio == 0:
        return '<span class="quiet">equal</span>'
    place = 1.0 if not math.isfinite(ratio) else min(max((math.log10(ratio) + 4) / 8, 0.02), 1.0)
    state = "bad" if ratio > 1 else "good"
    return (
        f'<svg class="small" viewBox="0 0 100 10"><rect class="track" width="100" height="10" rx="2"/>'
        f'<rect class="fill {state}" width="{100 * place:.0f}" height="10" rx="2"/>'
        f'<line class="bound" x1="50" x2="50" y1="0" y2="10"/></svg><span class="value">{number(ratio)}</span>'
    )


def _inside(layer: LayerReport) -> Iterator[str]:
    if layer.compared is not None:
        yield '<div class="views">' + channels(layer.compared) + "</div>"
        yield (
            '<p class="keys"><span class="key"><i class="swatch source"></i>source</span><span class="key">'
            '<i class="swatch held"></i>held by the target</span><span class="key"><i class="swatch bad"></i>beyond the'
            " bound</span></p>"
        )
        yield from _wrong_channels(layer)
    if layer.checks:
        rows = "".join(
            f"<tr><td>{text(c.name)}</td><td>{number(c.error)}</td><td>{number(c.bound)}</td><td>{number(c.ratio)}</td>"
            f"<td>{c.channel}</td><td>{'' if c.probe is None else number(c.probe)}</td></tr>"
            for c in layer.checks
        )
        yield (
            "<table><thead><tr><th>check</th><th>error</th><th>bound</th><th>error / bound</th><th>channel</th>"
            f"<th>input</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    said = [*layer.notes, *([f"paired by {layer.evidence}"] if layer.evidence else [])]
    if layer.written:
        said.insert(0, f"written: {', '.join(layer.written)}")
    if layer.compared is not None:
        source, held = layer.compared.source, layer.compared.held
        if source.epsilon != held.epsilon:
            said.insert(0, f"epsilon {source.epsilon!r} in the source, {held.epsilon!r} held")
    yield "".join(f'<p class="note">{text(note, 600)}</p>' for note in said)


def _wrong_channels(layer: LayerReport) -> Iterator[str]:
    """The worst channels in numbers, where there are any beyond the bound."""
    assert layer.compared is not None
    (a, new_a, ratio_a), (b, new_b, ratio_b) = layer.compared.affine()
    wrong = [(ratio_a[c], c) if ratio_a[c] >= ratio_b[c] else (ratio_b[c], c) for c in range(a.size)]
    wrong = sorted((pair for pair in wrong if pair[0] > 1), reverse=True)
    if not wrong:
        return
    rows = "".join(
        f"<tr><td>{c}</td><td>{number(a[c])}</td><td>{number(new_a[c])}</td><td>{number(b[c])}</td>"
        f"<td>{number(new_b[c])}</td><td>{number(ratio)}</td></tr>"
        for ratio, c in wrong[:_MOST_CHANNELS_NAMED]
    )
    yield (
        f"<p><strong>{len(wrong)} of {a.size} channels</strong> are beyond the bound; the worst:</p><table><thead><tr>"
        "<th>channel</th><th>slope expected</th><th>got</th><th>intercept expected</th><th>got</th><th>error / bound</th>"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _foot(report: Report) -> str:
    lines = [f"<li>{text(note, 600)}</li>" for note in report.notes]
    lines += [f"<li>{text(word)}: {text(', '.join(names), 600)}</li>" for word, names in report.left.items()]
    lines += [f"<li>not run: {text(what, 400)}</li>" for what in report.not_run]
    lines += [f"<li>sha256 <code>{text(d)}</code> {text(path)}</li>" for path, d in report.sha256.items()]
    return f"<footer><ul>{''.join(lines)}</ul></footer>" if lines else ""
