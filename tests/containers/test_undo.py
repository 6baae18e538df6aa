"""The undo file of a change in place: what it keeps, how little that is, and what is not taken for one."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bnport.containers import in_place
from bnport.containers.in_place import UNDO, change, restore
from bnport.containers.patch import Patch
from bnport.errors import FormatError
from tests.test_in_place import contents, put


def _stopped(path, patches):
    """The undo file of a change, and the changed file behind its seals: as a kill before step 4 leaves them."""
    kept = {}

    def check():
        kept["undo"] = contents(path + UNDO)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change(path, patches, check)
    half = bytearray(contents(path))
    for patch in (*patches, Patch(0, in_place.SEAL)):
        half[patch.offset : patch.offset + len(patch.data)] = patch.data
    put(path, bytes(half))
    put(path + UNDO, kept["undo"])
    return kept["undo"]


@pytest.mark.parametrize("trained", [False, True])
def test_the_old_values_of_a_fresh_layer_take_hardly_any_room_and_all_come_back(tmp_path, trained):
    rng = np.random.default_rng(0)
    channels, path = 50_000, str(tmp_path / "f")
    held = rng.normal(size=(4, channels)) if trained else np.repeat([[1], [0], [0], [1]], channels, axis=1)
    old = b"header" * 100 + held.astype("<f4").tobytes() + b"the rest"
    put(path, old)
    new = rng.normal(size=4 * channels).astype("<f4").tobytes()
    undo = _stopped(path, [Patch(600, new)])
    assert (len(undo) < len(new) / 50) != trained
    assert contents(path)[600 : 600 + len(new)] == new
    assert f"old contents are back ({800_000 + len(in_place.SEAL)} bytes)" in restore(path)
    assert contents(path) == old


def test_what_the_file_holds_already_is_not_written(tmp_path):
    path, checked = str(tmp_path / "f"), []
    put(path, bytes(range(200)))
    before = os.stat(path)
    change(path, [Patch(20, bytes(range(20, 40))), Patch(150, bytes([150]))], lambda: checked.append(1))
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert checked == [1]
    change(
        path, [Patch(20, bytes(range(20, 40))), Patch(150, b"\0")], lambda: checked.append(os.path.getsize(path + UNDO))
    )
    assert contents(path) == bytes(range(150)) + b"\0" + bytes(range(151, 200))
    assert checked[1] < 250


def test_of_a_long_text_only_what_differs_is_written_wherever_it_lies(tmp_path):
    path, rng = str(tmp_path / "f"), np.random.default_rng(0)
    old = rng.bytes(5000)
    for _ in range(200):
        put(path, old)
        new = bytearray(old)
        for at in rng.integers(0, 5000, rng.integers(1, 5)):
            new[at : at + 20] = rng.bytes(20)
        new, start = bytes(new[:5000]), int(rng.integers(0, 4000))
        patch = Patch(start, new[start : start + int(rng.integers(1, 1001))])
        end = start + len(patch.data)
        sizes = []
        change(
            path,
            [patch],
            lambda sizes=sizes: sizes.append(os.path.exists(path + UNDO) and os.path.getsize(path + UNDO)),
        )
        assert contents(path) == old[:start] + new[start:end] + old[end:]
        assert sizes[0] < 1500


def test_an_undo_file_of_another_version_is_neither_used_nor_removed(tmp_path):
    path = str(tmp_path / "f")
    put(path, bytes(200))
    undo = b"bnport undo 1\n" + _stopped(path, [Patch(50, b"abc")])[len(in_place.MAGIC) :]
    put(path + UNDO, undo)
    put(path, bytes(200))
    with pytest.raises(FormatError, match="not an undo file of this version"):
        restore(path)
    assert contents(path + UNDO) == undo


def test_an_undo_file_that_would_become_too_large_is_refused(tmp_path, monkeypatch):
    path = str(tmp_path / "f")
    put(path, bytes(100_000))
    _stopped(path, [Patch(100, b"\1" * 90_000)])
    half = contents(path)
    monkeypatch.setattr(in_place, "_LARGEST_UNDO", 50_000)
    with pytest.raises(FormatError, match="not an undo file of this version"):
        restore(path)
    assert contents(path) == half
