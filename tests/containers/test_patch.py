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
from bnport.errors import FormatError

pytestmark = pytest.mark.core


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


def with_descriptors(path, members, *, signature=True, width=4, wide=False, gap=b""):
    """An archive by hand (APPNOTE 4.3): sizes behind the data, and in the directory in 64 bits if `wide`."""

    def sizes(data, packed, width):
        return len(packed).to_bytes(width, "little") + len(data).to_bytes(width, "little")

    body, entries = b"", b""
    for name, (data, method) in members.items():
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(data) + packer.flush() if method else data
        crc, at = zlib.crc32(data).to_bytes(4, "little"), len(body)
        middle = method.to_bytes(2, "little") + b"\0\0\x21\x28"
        mark = b"PK\x07\x08" if signature else b""
        extra, local = b"", sizes(b"", b"", 4)
        if width == 8:
            extra, local = b"\1\0\x10\0" + bytes(16), b"\xff" * 8
        lengths = len(name).to_bytes(2, "little") + len(extra).to_bytes(2, "little")
        body += b"PK\3\4\x2d\0\x08\0" + middle + bytes(4) + local + lengths + name.encode() + extra
        body += packed + mark + crc + sizes(data, packed, width) + gap
        extra, central, offset = b"", sizes(data, packed, 4), at.to_bytes(4, "little")
        if wide:
            extra = b"".join(v.to_bytes(8, "little") for v in (len(data), len(packed), at))
            extra, central, offset = b"\x75\0\1\0x\1\0\x18\0" + extra, b"\xff" * 8, b"\xff" * 4
        lengths = len(name).to_bytes(2, "little") + len(extra).to_bytes(2, "little")
        entries += b"PK\1\2\x2d\0\x2d\0\x08\0" + middle + crc + central + lengths + bytes(10) + offset
        entries += name.encode() + extra
    count, where = len(members).to_bytes(2, "little"), len(entries).to_bytes(4, "little")
    end = b"PK\5\6" + bytes(4) + count * 2 + where + len(body).to_bytes(4, "little") + b"\0\0"
    path.write_bytes(body + entries + end)
    return Archive(ReadFile(str(path)))


@pytest.mark.parametrize("new", [b"{}", b'{"epsilon": 1e-05, "more": 1}' * 99])
@pytest.mark.parametrize("signature", [True, False])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("gap", [b"", b"foreign bytes"])
def test_a_member_whose_sizes_follow_it_is_replaced_with_its_sizes_before_it(
    tmp_path, new, signature, width, wide, gap
):
    path, out = tmp_path / "a.zip", tmp_path / "out.zip"
    members = {"m": (b"{}", 8), "c": (CONFIG, 8), "d": (CONFIG[:-1], 0), "w": (WEIGHTS, 0), "z": (b"last", 8)}
    archive = with_descriptors(path, members, signature=signature, width=width, wide=wide, gap=gap)
    start, _ = archive.window("w")
    patches = [Patch(start + 7, b"seven")]
    out.write_bytes(b"")
    contents = {"c": new, "d": new}
    replace_members(archive, str(out), contents, patches + crc_patches(archive, archive.member("w"), patches))
    found = members_of(out)
    assert [found[name][:2] for name in "mcdz"] == [(b"{}", 8), (new, 8), (new, 0), (b"last", 8)]
    assert found["w"][0] == WEIGHTS[:7] + b"seven" + WEIGHTS[12:]
    with zipfile.ZipFile(out) as written:
        flags = [info.flag_bits & 8 for info in written.infolist()]
    assert flags == [8, 0, 0, 8, 8]
    again = Archive(ReadFile(str(out)))  # our own strict reader agrees, and so does one that reads from front to back
    assert [again.read(name) for name in "mcdz"] == [b"{}", new, new, b"last"]
    if not gap:
        sizes = {name: (len(data), method) for name, (data, method, _) in found.items()}
        assert streamed_sizes(out.read_bytes(), 8 if width == 8 else 4, signature) == sizes


def streamed_sizes(data, width, signature):
    """name -> (size, method) from the local headers and descriptors alone."""
    at, found = 0, {}
    while data[at : at + 4] == b"PK\3\4":
        flags, method = data[at + 6], data[at + 8]
        packed = int.from_bytes(data[at + 18 : at + 22], "little")
        size = int.from_bytes(data[at + 22 : at + 26], "little")
        name_end = at + 30 + data[at + 26]
        if packed == 0xFFFFFFFF:
            size, packed = (int.from_bytes(data[name_end + n : name_end + n + 8], "little") for n in (4, 12))
        name, start = data[at + 30 : name_end].decode(), name_end + data[at + 28]
        if flags & 8:
            if method:
                inflater = zlib.decompressobj(-15)
                size = len(inflater.decompress(data[start:]))
                packed = len(data) - start - len(inflater.unused_data)
            else:
                size = packed = len(WEIGHTS)
                crc = start + size + 4 * signature
                assert data[crc : crc + 4] == zlib.crc32(data[start : start + size]).to_bytes(4, "little")
            start += (4 if signature else 0) + 4 + 2 * width
        found[name], at = (size, method), start + packed
    return found


@pytest.mark.parametrize("work", ["replace", "patch"])
def test_a_descriptor_that_is_not_there_is_not_written_over(tmp_path, work):
    path, out = tmp_path / "a.zip", tmp_path / "out.zip"
    archive_of(path, {"c": (CONFIG, 0), "w": (WEIGHTS, 0)}, streamed=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x07\x08", b"PK\x07\x09"))
    archive = Archive(ReadFile(str(path)))
    out.write_bytes(b"")
    patches = [Patch(archive.window("c")[0], b"x")]
    works = {
        "replace": lambda: replace_members(archive, str(out), {"c": b"{}"}),
        "patch": lambda: crc_patches(archive, archive.member("c"), patches),
    }
    with pytest.raises(FormatError, match="no data descriptor"):
        works[work]()


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
