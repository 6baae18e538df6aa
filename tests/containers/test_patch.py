"""A patched copy against zlib, zipfile and unzip's own idea of a good archive."""

from __future__ import annotations

import io
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnport.containers.files import ReadFile
from bnport.containers.patch import Patch, copy_patched, crc_patches, joined, replace_members, updated_crc
from bnport.containers.zip import Archive


@given(st.binary(min_size=1, max_size=300), st.data())
def test_the_updated_crc_is_zlibs_crc_of_the_changed_text(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True)))
    changed, changes = bytearray(text), []
    for start, end in zip(cuts[::2], cuts[1::2], strict=False):
        new = data.draw(st.binary(min_size=end - start, max_size=end - start))
        changes.append((start, text[start:end], new))
        changed[start:end] = new
    assert updated_crc(zlib.crc32(text), changes, len(text)) == zlib.crc32(bytes(changed))


def test_a_crc_is_updated_across_gigabytes_that_are_not_read():
    block, count = b"\1" * (1 << 20), 5000

    def crc(first):
        value = zlib.crc32(first)
        return zlib.crc32(block, value)

    before, after = crc(b"old!"), crc(b"new!")
    assert updated_crc(before, [(0, b"old!", b"new!")], 4 + len(block)) == after
    # and by the algebra alone: updating twice is updating once, whatever the length
    length = count << 20
    once = updated_crc(7, [(9, b"ab", b"yz")], length)
    twice = updated_crc(updated_crc(7, [(9, b"a", b"y")], length), [(10, b"b", b"z")], length)
    assert once == twice != 7


def test_touching_patches_become_one():
    assert joined([Patch(4, b"cd"), Patch(0, b"ab"), Patch(2, b"xx")]) == [Patch(0, b"abxxcd")]


def archive_of(path, members, streamed=False, **options):
    class Pipe(io.RawIOBase):  # without seek zipfile writes data descriptors
        def __init__(self, file):
            self.file = file

        def writable(self):
            return True

        def write(self, data):
            return self.file.write(data)

    with open(path, "wb") as file, zipfile.ZipFile(Pipe(file) if streamed else file, "w") as archive:
        for name, (data, method) in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 2, 3, 4, 6)), data, method, **options)
        archive.comment = b"a comment"
    return Archive(ReadFile(str(path)))


WEIGHTS = np.random.default_rng(0).bytes(50_000)
CONFIG = b'{"epsilon": 0.001}' * 50


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {info.filename: (archive.read(info), info.compress_type, info.date_time) for info in archive.infolist()}


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "data descriptors"])
def test_patched_members_have_the_right_crc_and_everything_else_the_same_bytes(tmp_path, streamed):
    path, out = tmp_path / "a.zip", tmp_path / "out.zip"
    archive = archive_of(path, {"m": (b"{}", 0), "w": (WEIGHTS, 0), "z": (b"end", 0)}, streamed)
    start, _ = archive.window("w")
    patches = [Patch(start + 100, b"new bytes"), Patch(start + len(WEIGHTS) - 3, b"end")]
    out.write_bytes(b"")
    copy_patched(archive.file, str(out), patches + crc_patches(archive, archive.member("w"), patches))
    expected = bytearray(WEIGHTS)
    expected[100:109], expected[-3:] = b"new bytes", b"end"
    found, before = members_of(out), members_of(path)
    assert found["w"][0] == bytes(expected)
    assert {k: v for k, v in found.items() if k != "w"} == {k: v for k, v in before.items() if k != "w"}
    different = [i for i, (a, b) in enumerate(zip(path.read_bytes(), out.read_bytes(), strict=True)) if a != b]
    assert len(different) <= 12 + 3 * 4


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("new", [b"{}", b'{"epsilon": 1e-05, "more": 1}' * 99])
def test_a_replaced_member_may_shrink_and_grow(tmp_path, method, new):
    path, out = tmp_path / "a.zip", tmp_path / "out.zip"
    archive = archive_of(path, {"m": (b"{}", 8), "c": (CONFIG, method), "w": (WEIGHTS, 0), "z": (b"last", 8)})
    start, _ = archive.window("w")
    patches = [Patch(start + 7, b"seven")]
    out.write_bytes(b"")
    replace_members(archive, str(out), {"c": new}, patches + crc_patches(archive, archive.member("w"), patches))
    found, before = members_of(out), members_of(path)
    assert found["c"] == (new, method, before["c"][2])
    assert found["w"][0] == WEIGHTS[:7] + b"seven" + WEIGHTS[12:]
    assert [found["m"], found["z"]] == [before["m"], before["z"]]
    with zipfile.ZipFile(out) as archive_out:
        assert archive_out.comment == b"a comment"
    assert list(Archive(ReadFile(str(out))).members) == ["m", "c", "w", "z"]  # our own strict reader agrees


def test_a_zip64_archive_keeps_its_directory_right(tmp_path):
    path, out = tmp_path / "a.zip", tmp_path / "out.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c", CONFIG)
        with archive.open(zipfile.ZipInfo("w"), "w", force_zip64=True) as member:
            member.write(WEIGHTS)
        for number in range(0xFFFF):  # more members than 16 bits count: a zip64 end record
            archive.writestr(f"{number}", b"")
    archive = Archive(ReadFile(str(path)))
    start, _ = archive.window("w")
    patches = [Patch(start, b"first")]
    out.write_bytes(b"")
    replace_members(archive, str(out), {"c": b"short"}, patches + crc_patches(archive, archive.member("w"), patches))
    with zipfile.ZipFile(out) as found:
        assert found.read("c") == b"short"
        assert found.read("w") == b"first" + WEIGHTS[5:]
        assert len(found.namelist()) == 0xFFFF + 2
        assert found.read("65534") == b""
    assert len(Archive(ReadFile(str(out))).members) == 0xFFFF + 2


def test_a_patch_outside_its_member_is_refused(tmp_path):
    archive = archive_of(tmp_path / "a.zip", {"w": (WEIGHTS, 0), "z": (b"last", 0)})
    start, size = archive.window("w")
    with pytest.raises(ValueError, match="outside"):
        crc_patches(archive, archive.member("w"), [Patch(start + size - 1, b"xy")])
