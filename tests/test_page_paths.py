"""A page never takes the place of a model, and what cannot be written is refused before anything is."""

from __future__ import annotations

import os
import shutil

import pytest

from bnport.cli import main

from .test_cli import PTH, TWIN


@pytest.fixture
def models(tmp_path):
    for path, name in ((PTH, "a.pth"), (TWIN, "t.keras")):
        shutil.copy(path, tmp_path / name)
    return str(tmp_path / "a.pth"), str(tmp_path / "t.keras"), tmp_path


def _bytes(*paths):
    return [open(path, "rb").read() for path in paths]


def test_a_page_never_replaces_a_model(models, capsys):
    source, target, folder = models
    before, hard = _bytes(source, target), str(folder / "hard.html")
    os.link(target, hard)
    out = str(folder / "o.keras")
    for page in (source, target, hard, os.path.join(str(folder), ".", "t.keras")):
        for force in ([], ["--force"]):
            assert main(["verify", source, target, "--html", page, *force]) == 2
            assert main(["convert", source, target, "-o", out, "--html", page, *force]) == 2
            assert "Traceback" not in capsys.readouterr().err
    assert main(["convert", source, target, "-o", out, "--html", out, "--force"]) == 2
    assert "is the model" in capsys.readouterr().err
    assert not os.path.exists(out)
    assert _bytes(source, target) == before


def test_a_page_that_cannot_be_written_is_refused_before_the_conversion(models):
    source, target, folder = models
    out, page = str(folder / "o.keras"), str(folder / "page.html")
    assert main(["convert", source, target, "-o", out, "--html", str(folder / "nix" / "page.html")]) == 2
    assert not os.path.exists(out)
    assert main(["convert", source, target, "-o", out, "--html", page]) == 0
    assert main(["convert", source, target, "-o", str(folder / "p.keras"), "--html", page]) == 2
    assert not os.path.exists(folder / "p.keras")
    assert main(["convert", source, target, "-o", str(folder / "p.keras"), "--html", page, "--force"]) == 0


def test_force_replaces_pages_only(models, capsys):
    source, target, folder = models
    other = folder / "notes.html"
    other.write_text("<html>mine</html>")
    assert main(["verify", source, target, "--html", str(other), "--force"]) == 2
    assert "is not a page that bnport wrote" in capsys.readouterr().err
    assert other.read_text() == "<html>mine</html>"


def test_leaving_every_layer_out_is_no_result(models, capsys):
    source, target, folder = models
    for command in (["verify", source, target], ["convert", source, target, "-o", str(folder / "o.keras")]):
        assert main([*command, "--skip", "*"]) == 2
        assert "nothing to pair" in capsys.readouterr().err
    assert not os.path.exists(folder / "o.keras")
