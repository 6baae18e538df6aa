"""Our zip reader against zipfile and torch as oracles, and against archives made to harm."""

from __future__ import annotations

import os
import random
import re
import struct
import time
import zipfile
import zlib

import pytest
import torch

from bnport.containers.files import ReadFile
from bnport.containers.zip import Archive
from bnport.errors import BnportError, FormatError, NotFound


def archive_at(path, **options):
    return Archive(ReadFile(str(path)), **options)


def made(path, members, method=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members:
            file.writestr(name, data, **more)
    return path


MEMBERS = [("a.txt", b"alpha" * 40), ("folder/b.bin", bytes(range(256)) * 9), ("empty", b""), ("ünïcode", b"x")]


# ---- agreement with zipfile


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_and_bytes_are_those_that_zipfile_gives(tmp_path, method):
    path = made(tmp_path / "x.zip", MEMBERS, method)
    archive = archive_at(path)
    with zipfile.ZipFile(path) as oracle:
        assert list(archive.members) == oracle.namelist()
        for info in oracle.infolist():
            member = archive.members[info.filename]
            assert (member.size, member.compressed, member.crc) == (info.file_size, info.compress_size, info.CRC)
            assert member.header_offset == info.header_offset
            assert archive.read(info.filename) == oracle.read(info.filename)


def test_a_stored_member_is_read_by_position(tmp_path):
    path = made(tmp_path / "x.zip", MEMBERS)
    archive = archive_at(path)
    data = path.read_bytes()
    offset, size = archive.window("folder/b.bin")
    assert data[offset : offset + size] == MEMBERS[1][1]
    assert archive.pread("folder/b.bin", 250, 12) == MEMBERS[1][1][250:262]
    archive.check_crc("folder/b.bin")
    with pytest.raises(FormatError, match="asked for"):
        archive.pread("folder/b.bin", size - 1, 2)


def test_a_compressed_member_has_no_window(tmp_path):
    archive = archive_at(made(tmp_path / "x.zip", MEMBERS, zipfile.ZIP_DEFLATED))
    with pytest.raises(FormatError, match="compressed"):
        archive.window("a.txt")


def test_the_central_offset_is_where_the_crc_can_be_patched(tmp_path):
    path = made(tmp_path / "x.zip", MEMBERS)
    data = path.read_bytes()
    for member in archive_at(path).members.values():
        assert data[member.central_offset : member.central_offset + 4] == b"PK\x01\x02"
        assert struct.unpack_from("<L", data, member.central_offset + 16)[0] == member.crc
        assert struct.unpack_from("<L", data, member.header_offset + 14)[0] == member.crc


def test_zip64_is_read_where_zipfile_writes_it(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in MEMBERS:
            with file.open(name, "w", force_zip64=True) as member:
                member.write(data)
    archive = archive_at(path)
    for name, data in MEMBERS:
        assert archive.read(name) == data


def test_a_name_in_the_old_code_page_is_read_and_held_against_its_local_header(tmp_path):
    path = tmp_path / "old.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("xbc", b"alpha")
    path.write_bytes(path.read_bytes().replace(b"xbc", b"\x81bc"))  # of 1981; no flag says UTF-8
    with zipfile.ZipFile(path) as file:
        (name,) = file.namelist()
        assert archive_at(path).read(name, 10) == file.read(name) == b"alpha"
    path.write_bytes(path.read_bytes().replace(b"\x81bc", b"\x82bc", 1))
    with pytest.raises(FormatError, match="its local header is named"):
        archive_at(path).read(name, 10)


def test_a_sparse_archive_of_more_than_four_gibibytes_is_read_without_reading_it(tmp_path):
    path = tmp_path / "big.zip"
    size = (4 << 30) + 7
    with zipfile.ZipFile(path, "w") as file:
        with file.open("big", "w", force_zip64=True):
            pass
        file.writestr("after", b"after it")
    # zipfile wrote an empty member; make it 4 GiB long with a hole, as a 4 GB checkpoint would lie
    data = bytearray(path.read_bytes())
    archive = archive_at(path)
    begin, after = archive.members["big"].data_offset, archive.members["after"].header_offset
    directory = archive.members["big"].central_offset
    # these two: zipfile before 3.11.4 writes 0
    struct.pack_into("<LL", data, archive.members["big"].header_offset + 18, *[0xFFFFFFFF] * 2)
    struct.pack_into("<QQ", data, begin - 16, size, size)  # local zip64 extra: size, compressed
    with open(path, "wb") as file:
        file.write(data[:begin])
        file.seek(begin + size)
        file.write(data[after:directory])
        where = file.tell()
        for name, long, offset in (("big", size, 0), ("after", len(b"after it"), begin + size)):
            extra = struct.pack("<HHQQQ", 1, 24, long, long, offset)
            crc = archive.members[name].crc
            file.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, *[0xFFFFFFFF] * 2, len(name), 28, 0,
                                   0, 0, 0, 0xFFFFFFFF) + name.encode() + extra)  # fmt: skip
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, end - where, where))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, *[0xFFFFFFFF] * 2, 0))
    with zipfile.ZipFile(path) as oracle:
        assert oracle.read("after") == b"after it"
    started = time.process_time()
    archive = archive_at(path)
    assert archive.read("after") == b"after it"
    assert archive.members["big"].size == size
    assert archive.pread("big", size - 3, 3) == b"\0\0\0"
    with pytest.raises(FormatError, match="at most"):
        archive.read("big")
    assert time.process_time() - started < 1


def test_an_archive_comment_and_data_descriptors_are_understood(tmp_path):
    class Unseekable:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    path = tmp_path / "x.zip"
    with open(path, "wb") as raw, zipfile.ZipFile(Unseekable(raw), "w") as file:
        file.writestr("a", b"streamed")
        file.comment = b"a comment"
    archive = archive_at(path)
    assert archive.members["a"].flags & 8
    assert archive.read("a") == b"streamed"


def test_what_torch_writes_without_checksums_is_read_only_where_that_is_allowed(tmp_path):
    path = str(tmp_path / "x.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert archive_at(path).checksums is False
    with pytest.raises(FormatError, match="CRC-32"):
        archive_at(path).read("x/data.pkl")
    assert archive_at(path, without_checksums=True).read("x/data/0") == torch.arange(5).numpy().tobytes()


def test_a_missing_member_lists_what_there_is(tmp_path):
    with pytest.raises(NotFound, match=re.escape("a.txt, folder/b.bin")):
        archive_at(made(tmp_path / "x.zip", MEMBERS)).read("config.json")


# ---- hostile


def read_all(path):
    archive = archive_at(path)
    return {name: archive.read(name) for name in archive.members}


def refused(path, match):
    with pytest.raises(FormatError, match=match) as caught:
        read_all(path)
    assert os.path.basename(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04" + bytes(100), b"\0" * 70_000])
def test_no_end_record_is_refused(tmp_path, data):
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    refused(path, "no end of a zip archive")


def test_every_truncation_is_refused(tmp_path):
    data = made(tmp_path / "x.zip", MEMBERS).read_bytes()
    path = tmp_path / "cut.zip"
    for length in range(0, len(data), 23):
        path.write_bytes(data[:length])
        refused(path, "cut.zip")


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("zeros", "w") as member:
        for _ in range(200):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 400_000
    refused(path, "at most 134217728 are read")
    with pytest.raises(FormatError, match="at most 1000 are read"):
        archive_at(path).read("zeros", limit=1000)


def test_a_stream_longer_or_shorter_than_declared_is_refused(tmp_path):
    data = bytearray(made(tmp_path / "x.zip", [("a", b"abc" * 100)], zipfile.ZIP_DEFLATED).read_bytes())
    path = tmp_path / "lie.zip"
    for size in (10, 299, 301):
        central = data.index(b"PK\x01\x02")
        struct.pack_into("<L", data, central + 24, size)
        struct.pack_into("<L", data, 22, size)
        path.write_bytes(data)
        refused(path, f"does not inflate to the {size} bytes")


def test_a_size_that_deflate_cannot_reach_is_refused_on_opening(tmp_path):
    data = bytearray(made(tmp_path / "x.zip", [("a", b"abc" * 100)], zipfile.ZIP_DEFLATED).read_bytes())
    central = data.index(b"PK\x01\x02")
    struct.pack_into("<L", data, central + 24, 100_000_000)
    path = tmp_path / "lie.zip"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="cannot unpack to the 100000000"):
        archive_at(path)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "C:/x", "a\\..\\..\\x", "..\\x", "\\\\host\\x"])
def test_a_name_that_climbs_out_is_refused(tmp_path, name):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        file.writestr(info, b"x")
    refused(path, "not a name that an archive may hold")


def test_duplicate_members_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    with pytest.warns(UserWarning, match="Duplicate"):
        made(path, [("a", b"first"), ("a", b"second")])
    refused(path, "occurs twice")


def test_a_flipped_bit_in_a_member_is_noticed(tmp_path):
    path = made(tmp_path / "x.zip", MEMBERS)
    data = bytearray(path.read_bytes())
    data[archive_at(path).window("folder/b.bin")[0] + 100] ^= 4
    path.write_bytes(data)
    refused(path, "CRC-32 is .* the file is damaged")
    with pytest.raises(FormatError, match="CRC-32"):
        archive_at(path).check_crc("folder/b.bin")


@pytest.mark.parametrize("bit", [0x1, 0x40, 0x2000])
def test_an_encrypted_member_is_refused(tmp_path, bit):
    data = bytearray(made(tmp_path / "x.zip", [("a", b"abc")]).read_bytes())
    central = data.index(b"PK\x01\x02")
    struct.pack_into("<H", data, central + 8, bit)
    path = tmp_path / "locked.zip"
    path.write_bytes(data)
    refused(path, "is encrypted")


def test_an_unknown_compression_method_is_refused(tmp_path):
    path = made(tmp_path / "x.zip", [("a", b"abc")], zipfile.ZIP_LZMA)
    refused(path, "compression method 14 is not understood")


def test_members_that_share_bytes_are_refused(tmp_path):
    """The overlap bomb: many entries of the directory point into one member."""
    inner = zlib.compressobj(9, zlib.DEFLATED, -15)
    kernel = inner.compress(bytes(1 << 20)) + inner.flush()
    crc = zlib.crc32(bytes(1 << 20))
    local = b"".join(
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(kernel), 1 << 20, 4, 0) + b"%04d" % i
        for i in range(50)
    )
    central = b""
    for i in range(50):
        long = len(kernel) + (49 - i) * 34
        central += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, long, 1 << 20, 4, 0, 0, 0, 0, 0, i * 34
        )
        central += b"%04d" % i
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 50, 50, len(central), len(local) + len(kernel), 0)
    path = tmp_path / "overlap.zip"
    path.write_bytes(local + kernel + central + end)
    refused(path, "overlap")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (30, "its local header is named"),
        (8, "disagree"),
        (14, "disagree"),
        (18, "disagree"),
        (22, "disagree"),
        (0, "no local"),
    ],
)
def test_a_local_header_that_contradicts_the_directory_is_refused(tmp_path, where, what):
    data = bytearray(made(tmp_path / "x.zip", [("abc", b"abc")]).read_bytes())
    data[where] ^= 8
    path = tmp_path / "two-faced.zip"
    path.write_bytes(data)
    refused(path, what)


def test_bytes_before_the_archive_or_a_second_end_are_refused(tmp_path):
    data = made(tmp_path / "x.zip", MEMBERS).read_bytes()
    path = tmp_path / "y.zip"
    path.write_bytes(b"#!/bin/sh\n" + data)
    refused(path, "foreign bytes before")
    empty_end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    path.write_bytes(data[:-2] + struct.pack("<H", len(empty_end)) + empty_end)
    refused(path, "2 possible ends")


def test_an_archive_in_parts_is_refused(tmp_path):
    data = bytearray(made(tmp_path / "x.zip", MEMBERS).read_bytes())
    struct.pack_into("<H", data, len(data) - 18, 1)
    path = tmp_path / "part.zip"
    path.write_bytes(data)
    refused(path, "several parts")


def test_sixty_thousand_members_open_within_five_seconds(tmp_path):
    path = tmp_path / "many.zip"
    local = b"".join(
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 6, 0) + b"%06d" % i for i in range(60_000)
    )
    central = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, i * 36) + b"%06d" % i
        for i in range(60_000)
    )
    path.write_bytes(
        local + central + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 60_000, 60_000, len(central), len(local), 0)
    )
    started = time.process_time()
    archive = archive_at(path)
    assert archive.read("059999") == b""
    assert time.process_time() - started < 5


def test_a_directory_of_more_members_than_bytes_is_refused(tmp_path):
    data = bytearray(made(tmp_path / "x.zip", MEMBERS).read_bytes())
    struct.pack_into("<HH", data, len(data) - 14, 60_000, 60_000)
    path = tmp_path / "x2.zip"
    path.write_bytes(data)
    refused(path, "is not read")


@pytest.mark.fuzz
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_mutant_is_read_as_zipfile_reads_it_or_refused(tmp_path, method):
    data = made(tmp_path / "x.zip", MEMBERS, method).read_bytes()
    path = tmp_path / "mutant.zip"
    random_ = random.Random(4)
    accepted = 0
    for _ in range(600):
        mutant = bytearray(data)
        for _ in range(random_.choice((1, 1, 2, 5))):
            at = random_.randrange(len(mutant))
            mutant[at] = random_.choice((0, 255, random_.randrange(256), mutant[at] ^ 1 << random_.randrange(8)))
        path.write_bytes(mutant)
        try:
            ours = read_all(path)
        except BnportError:
            continue
        accepted += 1
        try:
            with zipfile.ZipFile(path) as oracle:
                theirs = [oracle.read(info) for info in oracle.infolist()]
        except NotImplementedError:  # a mutated "version needed", which says nothing about the bytes
            continue
        assert theirs == list(ours.values())
    assert accepted > 5
