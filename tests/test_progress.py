"""The line on a terminal that says how far long work is: what counts as long, what it says, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import bnport
from bnport.cli import common
from bnport.containers import files, patch

DIGITS = Path(__file__).parent.parent / "fixtures" / "digits"


def on_screen(written):
    """The lines that a terminal shows after \\r, erase-to-end-of-line and \\n."""
    assert not set(re.findall(r"\x1b\[?.", written)) - {"\x1b[K"}
    return [line.rpartition("\r\x1b[K")[2] for line in written.split("\n")]


@pytest.mark.parametrize("total", [0, 7])
def test_the_progress_line_is_gone_when_the_work_ends_whether_its_length_was_known_or_not(total, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with common.Progress() as progress:
        progress(3, total, "images")
        shown = capsys.readouterr().err
        assert "3/7 images" in on_screen(shown)[0] if total else "3 done, images" in on_screen(shown)[0]
    shown += capsys.readouterr().err
    assert on_screen(shown) == [""]


def test_no_terminal_or_json_is_shown_no_progress(monkeypatch, capsys):
    with common.Progress() as progress:
        assert progress is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with common.Progress(quiet=True) as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_an_error_is_not_written_into_the_progress_line():
    import pty

    script = (
        "import sys, bnport.calibrate.images, bnport.cli, bnport.errors as e\n"
        "def statistics(*args, progress, **options):\n"
        "    progress(3, 0, 'images')\n"
        "    raise e.FormatError('broken')\n"
        "sys.modules['bnport.calibrate.images'].image_statistics = statistics\n"
        "sys.exit(bnport.cli.main(['stats', 'folder']))\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # EIO: the child has closed its side
            while data := os.read(ours, 1 << 16):
                written += data
    os.close(ours)
    text = written.decode().replace("\r\n", "\n")
    assert run.returncode == 2, text
    assert "3 done, images" in text
    assert on_screen(text) == ["bnport: broken", ""]


@pytest.fixture
def watched(monkeypatch):
    """What is told of files of a megabyte and more."""
    told = []
    monkeypatch.setattr(files, "LARGE", 1 << 20)
    files.watch(lambda *told_now: told.append(told_now))
    yield told
    files.watch(None)


@pytest.mark.parametrize("packed", [False, True])
def test_copying_flushing_and_hashing_large_files_are_told(watched, tmp_path, packed):
    target, source, out = str(tmp_path / "twin.keras"), str(tmp_path / "digits.pth"), str(tmp_path / "out.keras")
    with zipfile.ZipFile(DIGITS / "twin.keras") as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        new.writestr("more", np.random.default_rng(0).bytes(3 << 20))
    with zipfile.ZipFile(DIGITS / "digits.pth") as old, zipfile.ZipFile(source, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(f"{old.namelist()[0].split('/')[0]}/more", bytes(2 << 20))
    report = bnport.convert(source, target, out)
    assert report.ok
    assert report.sha256[source] == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    kinds = {what for _, _, what in watched}
    assert {"MB copied", "MB written to disk"} <= kinds
    assert all(0 <= done <= total <= 4 for done, total, _ in watched)
    copied = [done for done, _, what in watched if what == "MB copied"]
    assert copied == sorted(copied)
    watched.clear()
    files.sha256(source)
    assert {what for _, _, what in watched} == {"MB of digits.pth hashed"}


def test_small_files_are_not_told():
    told = []
    files.watch(lambda *told_now: told.append(told_now))
    try:
        assert bnport.verify(DIGITS / "digits.pth", DIGITS / "digits.safetensors").ok
    finally:
        files.watch(None)
    assert told == []


def test_waiting_for_a_hash_is_told(watched, tmp_path, monkeypatch):
    told = threading.Event()

    def hashed(path, go_on):
        assert go_on(1 << 20, 4 << 20)
        assert told.wait(60)
        return "the digest"

    monkeypatch.setattr(files, "_hashed", hashed)
    files.watch(lambda *now: (watched.append(now), told.set()))
    assert files.Digest(str(tmp_path / "large")).result() == "the digest"
    assert set(watched) == {(1, 4, "MB of large hashed")}


def test_compressing_is_told_and_gives_one_stream(watched, monkeypatch):
    monkeypatch.setattr(patch, "_PART", 1 << 20)
    plain = np.random.default_rng(0).integers(0, 4, 3_500_000, np.uint8).tobytes()
    assert zlib.decompress(patch._deflated(plain), -zlib.MAX_WBITS) == plain
    assert watched == [(min(k, 3), 3, "MB compressed") for k in range(5)]


def test_the_command_line_watches_on_a_terminal_only_and_no_longer_than_it_runs(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with common.Progress() as progress:
        assert files._watcher == progress
    assert files._watcher is None
    with common.Progress(quiet=True):
        assert files._watcher is None


def test_sums_of_an_array_are_told(monkeypatch):
    from bnport.calibrate import pixels

    monkeypatch.setattr(pixels, "AT_ONCE", 1000)
    told = []
    images = np.zeros((10, 10, 10, 3), np.uint8)
    bnport.image_statistics(images, progress=lambda *now: told.append(now))
    assert told == [(3, 10, "images"), (6, 10, "images"), (9, 10, "images"), (10, 10, "images")]
    told.clear()
    bnport.image_statistics(iter(images), progress=lambda *now: told.append(now))
    assert told == [(k, 0, "images") for k in range(1, 11)]
