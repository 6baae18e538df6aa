"""The page of a report: well-formed, self-contained, harmless whatever the names are, and true to the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import bnport
from bnport.errors import OutputError
from bnport.html import fragment, page, write_page
from bnport.verify import Check, LayerReport, Report, compare, with_checks
from tests.making import layers_of, telling

pytestmark = pytest.mark.core

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Parsed(HTMLParser):
    """Every start tag with its attributes, all text, and whether tags close in order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def with_class(self, name):
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]

    @property
    def text(self):
        return " ".join(self.words)


def report(names=("bn1", "bn2", "bn3"), wrong=(), run=False, channels=40, **more):
    source = {f"torch.{name}": telling(channels, seed=i) for i, name in enumerate(names)}
    held = dict(zip(names, source.values(), strict=True))
    for name in wrong:
        variance = held[name].variance.copy()
        variance[7] *= 4
        held[name] = held[name].replace(variance=variance)
    one, other = layers_of(source, "model.pth"), layers_of(held, "ported.keras")
    layers = compare(one, other, dict(zip(names, source, strict=True)))
    if run:
        layers = {n: with_checks(r, [Check("keras predict", 1e-7, 2e-7, 0.5, 3, 0.25)]) for n, r in layers.items()}
    return Report(source="model.pth", target="ported.keras", layers=layers.values(), **more)


def test_the_page_is_well_formed_and_loads_and_runs_nothing():
    parsed = Parsed(page(report(wrong=["bn2"], run=True)))
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "image", "use"}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") or name in ("src", "srcdoc", "xlink:href") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    policy = [a["content"] for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in page(report())
    assert "@import" not in page(report())


def test_names_from_a_file_are_text_and_nothing_else():
    evil = "<script>alert(1)</script>\"' onload=x \x1b[31m\n</title></svg>"
    parsed = Parsed(page(report(names=(evil, "b"), wrong=[evil], notes=[evil], not_run=[evil], sha256={evil: "00"})))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert not any("onload" in attributes for _, attributes in parsed.tags)
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x1b" not in page(report(names=(evil,)))
    Parsed(fragment(report(names=(evil,))))


def test_every_layer_has_its_mark_and_its_row_and_the_wrong_ones_are_open():
    parsed = Parsed(page(report(wrong=["bn2"], run=True)))
    assert len(parsed.with_class("layer")) == 3
    assert ["open" in attributes for attributes in parsed.with_class("layer")] == [False, True, False]
    overview = [a for a in parsed.with_class("mark") if "cx" in a or "x" in a]
    keys = 4
    assert len(overview) == 2 * 3 + keys
    assert sum("bad" in a["class"] for a in overview) == 1 + 1
    assert "NOT the same function" in parsed.text


def test_the_worst_channels_are_given_in_numbers():
    parsed = Parsed(page(report(wrong=["bn2"])))
    assert "1 of 40 channels" in parsed.text
    record = telling(40, seed=1)
    expected = record.affine()[0][7]
    shown = f"{expected:.4g}".replace("-", "−")
    assert shown in parsed.text


def test_a_mark_lies_above_the_bound_exactly_when_its_check_fails():
    layers = [
        LayerReport(f"l{i}", "s", 4, "different", (Check("a", ratio, 1.0, ratio, 0),))
        for i, ratio in enumerate((1e-9, 0.3, 0.999, 1.001, 50.0, 1e30, float("inf")))
    ]
    parsed = Parsed(page(Report(source="a", target="b", layers=layers)))
    bound = float(next(a["y1"] for t, a in parsed.tags if t == "line" and a.get("class") == "bound"))
    marks = [a for a in parsed.with_class("mark") if a.get("r") != "4"]
    heights = [float(a["cy"]) for a in marks]
    assert all(y >= bound for y in heights[:3])
    assert all(y <= bound for y in heights[3:])
    assert heights == sorted(heights, reverse=True)
    assert all(20 <= y <= 256 for y in heights), "nothing is drawn outside"


def test_invalid_layers_and_empty_reports_are_drawn_too():
    invalid = LayerReport("bad", "s", 4, "invalid", notes=("bad: variance, channel 1 is nan",))
    parsed = Parsed(page(Report(source="a", target="b", layers=[invalid])))
    assert "variance, channel 1 is nan" in parsed.text
    Parsed(page(Report(source="a", target="b", layers=[])))
    Parsed(fragment(Report(source="a", target="b", layers=[])))


@pytest.mark.parametrize("channels", [1, 2, 160, 161, 2048])
def test_any_width_is_drawn_within_its_panel(channels):
    source = page(report(names=("one",), channels=channels))
    for path in re.findall(r'<path class="(?:source|held)"[^>]* d="([^"]*)"', source):
        points = [float(x) for x in re.findall(r"M([\d.]+) ", path)]
        assert len(points) == min(channels, 160)
        assert 56 <= min(points) <= max(points) <= 480


def test_constant_and_zero_channels_are_drawn():
    record = telling(8).replace(gamma=np.zeros(8), beta=np.zeros(8))
    layers = layers_of({"x": record})
    Parsed(page(Report(source="a", target="b", layers=compare(layers, layers, {"x": "x"}).values())))


def test_the_notebook_form_is_the_fragment_and_stays_small():
    many = report(names=[f"bn{i}" for i in range(120)], wrong=["bn77"])
    html = many._repr_html_()
    assert html == fragment(many)
    parsed = Parsed(html.partition("<tbody>")[2].partition("</tbody>")[0])
    assert parsed.words[0] == "bn77", "the worst layer comes first"
    assert "and 90 more layers" in html
    assert len(html) < 100_000


def test_three_hundred_layers_stay_a_page_that_a_browser_opens_at_once():
    big = report(names=[f"bn{i}" for i in range(300)], channels=256, run=True)
    assert len(page(big)) < 5_000_000


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    write_page(report(), str(path))
    assert path.read_text() == page(report())
    with pytest.raises(OutputError, match="exists already"):
        write_page(report(), str(path))
    write_page(report(wrong=["bn1"]), str(path), force=True)
    assert "NOT the same" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_verify_and_convert_write_it_from_the_command_line(tmp_path):
    from bnport.cli import main

    records = __import__("bnport.adapters.records", fromlist=["save"])
    one, other = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    records.save(layers_of({"bn": telling(5)}), one)
    records.save(layers_of({"bn": telling(5).replace(epsilon=1e-3)}), other)
    assert main(["verify", one, other, "--html", str(tmp_path / "v.html")]) == 1
    assert "epsilon 1e-05 in the source, 0.001 held" in Parsed((tmp_path / "v.html").read_text()).text
    out = str(tmp_path / "c.safetensors")
    assert main(["convert", one, other, "-o", out, "--html", str(tmp_path / "c.html")]) == 0
    assert "written and verified" in Parsed((tmp_path / "c.html").read_text()).text
    assert bnport.verify(one, out).ok
